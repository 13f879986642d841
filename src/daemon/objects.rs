//! Objects: object-add, object-del, and the paths under which they are seen (qom-list, qom-get, qom-set).
//!
//! Invariants:
//! * an object that something refers to is not deleted;
//! * nothing of an object can be changed after it was made but the limits of a throttle-group.
//!
//! ```text
//! /                    container
//! └─ objects           container
//!    ├─ io0            iothread ─► a core ◄─ exports with iothread=io0
//!    └─ tg0            throttle-group ─► limits ◄─ throttle nodes with throttle-group=tg0
//! ```

use super::{Daemon, lock};
use crate::qmp::dispatch::{Call, Registry};
use crate::{Errno, Error};
use ringblock_drivers::export::IoThread;
use ringblock_drivers::options::object::{ObjectOptions, ObjectType};
use ringblock_drivers::options::throttle::{ThrottleGroupProperties, ThrottleLimits};
use ringblock_drivers::options::types::{Empty, is_id};
use ringblock_drivers::options::{Qapi, Value, from_json};
use ringblock_engine::error::ErrorClass;
use ringblock_engine::throttle::{Group, Groups};
use std::collections::BTreeMap;
use std::sync::Arc;

ringblock_drivers::qapi! {
    /// Arguments of object-del.
    struct ObjectDelArgs {
        /// The object.
        id: String = "id",
    }

    /// Arguments of qom-list.
    struct QomListArgs {
        /// The path of an object, or the end of one if no other ends so.
        path: String = "path",
    }

    /// Arguments of qom-get.
    struct QomGetArgs {
        /// The path of an object, or the end of one if no other ends so.
        path: String = "path",
        /// The property.
        property: String = "property",
    }

    /// Arguments of qom-set.
    struct QomSetArgs {
        /// The path of an object, or the end of one if no other ends so.
        path: String = "path",
        /// The property.
        property: String = "property",
        /// Its new value.
        value: Value = "value",
    }

    /// A property of an object.
    struct ObjectPropertyInfo {
        /// Its name.
        name: String = "name",
        /// Its type; "child<T>" for an object of type T below this one.
        kind: String = "type",
    }
}

/// How many objects there may be.
const LIMIT: usize = 1024;

/// All objects.
#[derive(Default)]
pub(super) struct Objects {
    all: BTreeMap<String, Object>,
    /// The turn of the cores.
    turn: usize,
}

/// An object. Whoever refers to it holds a clone.
#[derive(Clone)]
enum Object {
    Thread(Arc<IoThread>),
    Group(Arc<Group>),
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Object::Thread(_) => "iothread",
            Object::Group(_) => "throttle-group",
        }
    }

    fn is_used(&self) -> bool {
        match self {
            Object::Thread(t) => Arc::strong_count(t) > 1,
            Object::Group(g) => Arc::strong_count(g) > 1,
        }
    }

    fn properties(&self) -> Vec<Property> {
        let int = |name: String, value: Value| Property { name, kind: "int".into(), value };
        match self {
            Object::Thread(t) => vec![int("core".into(), t.core.into())],
            Object::Group(g) => {
                let limits = ThrottleLimits::of(&g.config()).write();
                let single = limits.as_object().into_iter().flatten();
                let mut all: Vec<_> = single.map(|(k, v)| int(format!("x-{k}"), v.clone())).collect();
                all.push(Property { name: "limits".into(), kind: "ThrottleLimits".into(), value: limits });
                all
            }
        }
    }
}

/// Something that has a path.
enum Place {
    Root,
    Objects,
    Object(Object),
}

/// A property and its value.
struct Property {
    name: String,
    kind: String,
    value: Value,
}

type DaemonCall<'a> = Call<'a, Daemon>;

/// Adds the commands.
pub(super) fn register(registry: &mut Registry<Daemon>) {
    registry.command("object-add", |call: &DaemonCall<'_>, options: ObjectOptions| {
        call.context.object_add(options).map(|()| Empty {})
    });
    registry.command("object-del", |call: &DaemonCall<'_>, args: ObjectDelArgs| {
        lock(&call.context.objects).del(&args.id).map(|()| Empty {})
    });
    registry.command("qom-list", |call: &DaemonCall<'_>, args: QomListArgs| {
        let properties = lock(&call.context.objects).properties(&args.path)?.1;
        let info = |p: Property| ObjectPropertyInfo { name: p.name, kind: p.kind };
        Ok(properties.into_iter().map(info).collect::<Vec<_>>())
    });
    registry.command("qom-get", |call: &DaemonCall<'_>, args: QomGetArgs| {
        let (kind, properties) = lock(&call.context.objects).properties(&args.path)?;
        let found = properties.into_iter().find(|p| p.name == args.property);
        found.map(|p| p.value).ok_or_else(|| no_property(kind, &args.property))
    });
    registry.command("qom-set", |call: &DaemonCall<'_>, args: QomSetArgs| {
        lock(&call.context.objects).set(&args).map(|()| Empty {})
    });
}

fn no_property(kind: &str, property: &str) -> Error {
    Error::invalid(format!("Property '{kind}.{property}' not found"))
}

impl Daemon {
    /// Makes an object.
    pub fn object_add(&self, options: ObjectOptions) -> Result<(), Error> {
        let storage = self.storage()?;
        let groups = storage.engine().throttle_groups();
        lock(&self.objects).add(options, storage.cores(), groups)
    }

    /// The iothread of this id; holding it keeps it from being deleted.
    pub(super) fn iothread(&self, id: &str) -> Result<Arc<IoThread>, Error> {
        match lock(&self.objects).all.get(id) {
            Some(Object::Thread(t)) => Ok(t.clone()),
            _ => Err(Error::invalid(format!("iothread \"{id}\" not found"))),
        }
    }
}

impl Objects {
    fn add(&mut self, options: ObjectOptions, cores: usize, groups: &Groups) -> Result<(), Error> {
        let id = options.base.id;
        if !is_id(&id) {
            return Err(Error::invalid("Parameter 'id' expects an identifier"));
        }
        if self.all.contains_key(&id) {
            let text = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Error::invalid(text));
        }
        if self.all.len() >= LIMIT {
            return Err(Error::new(Errno::ENOSPC, format!("There are {LIMIT} objects already")));
        }
        let object = match options.kind {
            ObjectType::Iothread(Empty {}) => {
                let core = self.turn % cores.max(1);
                self.turn = core + 1;
                Object::Thread(Arc::new(IoThread { id: id.clone(), core }))
            }
            ObjectType::ThrottleGroup(properties) => {
                let group = Group::new(id.clone(), properties.config()?);
                if !groups.add(&group) {
                    return Err(Error::new(
                        Errno::EEXIST,
                        format!("There is a throttle group '{id}' already"),
                    ));
                }
                Object::Group(group)
            }
        };
        self.all.insert(id, object);
        Ok(())
    }

    fn del(&mut self, id: &str) -> Result<(), Error> {
        let Some(object) = self.all.get(id) else {
            return Err(Error::invalid(format!("object '{id}' not found")));
        };
        // References to threads are made under the lock that is held here. A group that somebody finds just now lives on
        // without its object.
        if object.is_used() {
            return Err(Error::new(Errno::EBUSY, format!("object '{id}' is in use, can not be deleted")));
        }
        self.all.remove(id);
        Ok(())
    }

    /// Changes a property. Limits that are not given stay as they are; the buckets are empty afterwards.
    fn set(&self, args: &QomSetArgs) -> Result<(), Error> {
        let (kind, properties) = self.properties(&args.path)?;
        if !properties.iter().any(|p| p.name == args.property) {
            return Err(no_property(kind, &args.property));
        }
        match self.resolve(&args.path)? {
            Place::Object(Object::Group(group)) if args.property == "limits" => {
                let whole = Value::Object([("limits".to_owned(), args.value.clone())].into_iter().collect());
                let limits = from_json::<ThrottleGroupProperties>(&whole)?.limits.unwrap_or_default();
                group.set(limits.over(&group.config())?);
                Ok(())
            }
            Place::Object(Object::Group(_)) if args.property.starts_with("x-") => {
                Err(Error::invalid("Property cannot be set after initialization"))
            }
            _ => Err(Error::invalid(format!("Property '{kind}.{}' is not writable", args.property))),
        }
    }

    /// What stands at a path. One that does not begin with a slash may leave out the beginning.
    fn resolve(&self, path: &str) -> Result<Place, Error> {
        let parts: Vec<_> = path.split('/').filter(|p| !p.is_empty()).collect();
        let absolute = path.starts_with('/');
        let hit = |full: &[&str]| if absolute { full == parts } else { full.ends_with(&parts) };
        let mut found: Vec<Place> = Vec::new();
        found.extend(hit(&[]).then_some(Place::Root));
        found.extend(hit(&["objects"]).then_some(Place::Objects));
        let objects = self.all.iter().filter(|(id, _)| hit(&["objects", id]));
        found.extend(objects.map(|(_, o)| Place::Object(o.clone())));
        match (found.pop(), found.is_empty()) {
            (Some(place), true) => Ok(place),
            (Some(_), false) => Err(Error::invalid(format!("Path '{path}' is ambiguous"))),
            (None, _) => Err(Error::new(Errno::ENODEV, format!("Device '{path}' not found"))
                .with_class(ErrorClass::DeviceNotFound)),
        }
    }

    /// The type of what stands at a path, and its properties.
    fn properties(&self, path: &str) -> Result<(&'static str, Vec<Property>), Error> {
        let child = |name: &str, kind: &str, path: String| Property {
            name: name.into(),
            kind: format!("child<{kind}>"),
            value: path.into(),
        };
        let (kind, more) = match self.resolve(path)? {
            Place::Root => ("container", vec![child("objects", "container", "/objects".into())]),
            Place::Objects => {
                let one = |(id, o): (&String, &Object)| child(id, o.kind(), format!("/objects/{id}"));
                ("container", self.all.iter().map(one).collect())
            }
            Place::Object(o) => (o.kind(), o.properties()),
        };
        let own = Property { name: "type".into(), kind: "string".into(), value: kind.into() };
        Ok((kind, std::iter::once(own).chain(more).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(daemon: &Daemon, name: &str, args: Value) -> Value {
        Daemon::registry().run(daemon, name, &args).unwrap_or_else(|e| Value::from(e.message))
    }

    fn thread(id: &str) -> Value {
        json!({"qom-type": "iothread", "id": id})
    }

    /// Goal: cores are given out in turn, and objects are seen under their paths. Method: three on two cores, asked by
    /// whole paths, ends of paths, and wrong ones.
    #[test]
    fn paths() {
        let d = Daemon::start(2).unwrap();
        let get =
            |path: &str, property: &str| run(&d, "qom-get", json!({"path": path, "property": property}));
        let list = |path: &str| run(&d, "qom-list", json!({"path": path}));
        for id in ["io0", "io1", "io2"] {
            assert_eq!(run(&d, "object-add", thread(id)), json!({}));
        }
        let taken = "attempt to add duplicate property 'io1' to object (type 'container')";
        assert_eq!(run(&d, "object-add", thread("io1")), taken);
        assert_eq!(run(&d, "object-add", thread("9")), "Parameter 'id' expects an identifier");
        assert_eq!(
            (get("io0", "core"), get("/objects/io1", "core"), get("io2", "core")),
            (0.into(), 1.into(), 0.into())
        );
        assert_eq!((get("/", "type"), get("//objects/", "type")), ("container".into(), "container".into()));
        assert_eq!(
            (get("objects/io0", "type"), get("/objects", "io0")),
            ("iothread".into(), "/objects/io0".into())
        );
        assert_eq!(get("io0", "nosuch"), "Property 'iothread.nosuch' not found");
        assert_eq!(get("/nosuch", "type"), "Device '/nosuch' not found");
        assert_eq!(get("/io0", "type"), "Device '/io0' not found");
        assert_eq!(list(""), "Path '' is ambiguous");
        assert_eq!(list("io0"), json!([{"name": "type", "type": "string"}, {"name": "core", "type": "int"}]));
        assert_eq!(
            list("/objects").as_array().unwrap()[1],
            json!({"name": "io0", "type": "child<iothread>"})
        );
        assert_eq!(run(&d, "object-del", json!({"id": "nope"})), "object 'nope' not found");
        assert_eq!(run(&d, "object-del", json!({"id": "io1"})), json!({}));
        assert_eq!(run(&d, "object-add", thread("io1")), json!({}), "the id is free again");
        d.close().unwrap();
    }

    /// Goal: an iothread in use stays, and is free as soon as its export is gone. Method: one export, its mistakes told
    /// in the peer's order, and its removal.
    #[test]
    fn in_use() {
        let d = Daemon::start(1).unwrap();
        let dir = std::env::temp_dir().join(format!("ringblock-objects-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let export = |id: &str, node: &str, thread: &str| json!({"type": "nbd", "id": id, "node-name": node, "iothread": thread, "fixed-iothread": true});
        let add = |e: Value| run(&d, "block-export-add", e);
        let del = || run(&d, "object-del", json!({"id": "io0"}));
        run(&d, "blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 1048576}));
        assert_eq!(run(&d, "object-add", thread("io0")), json!({}));
        assert_eq!(add(export("9", "zz", "io9")), "Invalid block export id");
        assert_eq!(add(export("e", "zz", "io9")), "Cannot find device='' nor node-name='zz'");
        assert_eq!(add(export("e", "n", "io9")), "iothread \"io9\" not found");
        assert_eq!(add(export("e", "n", "io0")), "NBD server not running");
        let server = json!({"addr": {"type": "unix", "data": {"path": dir.join("s")}}});
        assert_eq!(run(&d, "nbd-server-start", server), json!({}));
        assert_eq!(add(export("e", "n", "io9")), "iothread \"io9\" not found");
        assert_eq!(add(export("e", "zz", "io0")), "Cannot find device='' nor node-name='zz'");
        assert_eq!(add(export("e", "n", "io0")), json!({}));
        assert_eq!(del(), "object 'io0' is in use, can not be deleted");
        assert_eq!(run(&d, "block-export-del", json!({"id": "e"})), json!({}));
        assert_eq!(del(), json!({}));
        d.close().unwrap();
        let _ = std::fs::remove_dir_all(&dir);
    }
}
