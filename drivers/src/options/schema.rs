//! Introspection: descriptors turned into the SchemaInfo list of `query-qmp-schema`.
//!
//! Declared types are listed under numbers instead of their names, as QEMU does: names are not part of the
//! interface, only structure is. Arrays are `[` element `]`. All whole numbers are `int`.
//!
//! ```text
//! command("blockdev-add", BlockdevOptions, Empty) ─► number("0"), number("1") … ─► queue ─► entries
//! ```

use super::desc::{Branch, Builtin, Def, Kind, Member, Type};
use super::{Map, Value};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Collects commands and events, then gives the whole list.
#[derive(Default)]
pub struct Schema {
    out: Vec<Value>,
    numbers: BTreeMap<&'static str, usize>,
    queue: VecDeque<&'static Def>,
    arrays: BTreeSet<String>,
    builtins: BTreeSet<&'static str>,
}

impl Schema {
    /// Adds a command with its arguments and what it returns.
    pub fn command(&mut self, name: &str, arg: Type, ret: Type, features: &[&str]) {
        let mut entry = json!({
            "name": name, "ret-type": self.name(ret), "meta-type": "command", "arg-type": self.name(arg),
        });
        put_features(&mut entry, features);
        self.out.push(entry);
    }

    /// Adds an event with its data.
    pub fn event(&mut self, name: &str, data: Type) {
        let arg = self.name(data);
        self.out.push(json!({"name": name, "meta-type": "event", "arg-type": arg}));
    }

    /// The list: commands and events as added, then the types in the order in which they were met.
    pub fn finish(mut self) -> Vec<Value> {
        while let Some(def) = self.queue.pop_front() {
            let entry = self.entry(def);
            self.out.push(entry);
        }
        self.out
    }

    fn name(&mut self, ty: Type) -> String {
        match ty {
            Type::Builtin(b) => self.builtin(b).to_owned(),
            Type::Array(of) => {
                let element = self.name(of());
                let name = format!("[{element}]");
                if self.arrays.insert(name.clone()) {
                    self.out.push(json!({"name": name, "element-type": element, "meta-type": "array"}));
                }
                name
            }
            Type::Def(def) => {
                let next = self.numbers.len();
                let number = *self.numbers.entry(def.name).or_insert_with(|| {
                    self.queue.push_back(def);
                    next
                });
                number.to_string()
            }
        }
    }

    fn builtin(&mut self, b: Builtin) -> &'static str {
        let (name, json_type) = match b {
            Builtin::Str => ("str", "string"),
            Builtin::Bool => ("bool", "boolean"),
            Builtin::Int(_) => ("int", "int"),
            Builtin::Number => ("number", "number"),
            Builtin::Any => ("any", "value"),
            Builtin::Null => ("null", "null"),
        };
        if self.builtins.insert(name) {
            self.out.push(json!({"name": name, "json-type": json_type, "meta-type": "builtin"}));
        }
        name
    }

    fn entry(&mut self, def: &'static Def) -> Value {
        let mut entry = Map::new();
        entry.insert("name".into(), self.name(Type::Def(def)).into());
        let meta = match &def.kind {
            Kind::Enum(words) => {
                let names: Vec<_> = words.iter().map(|w| w.name).collect();
                let members: Vec<_> = names.iter().map(|n| json!({"name": n})).collect();
                entry.insert("members".into(), members.into());
                entry.insert("values".into(), names.into());
                "enum"
            }
            Kind::Alternate(types) => {
                let members: Vec<_> = types.iter().map(|t| json!({"type": self.name(t())})).collect();
                entry.insert("members".into(), members.into());
                "alternate"
            }
            Kind::Struct { .. } => {
                entry.insert("members".into(), self.members(&def.members()).into());
                "object"
            }
            Kind::Union { tag, words, branches, .. } => {
                let mut members = vec![json!({"name": tag, "type": self.name(Type::Def(words))})];
                members.extend(self.members(&def.members()));
                entry.insert("tag".into(), (*tag).into());
                entry.insert("variants".into(), self.variants(branches).into());
                entry.insert("members".into(), members.into());
                "object"
            }
        };
        entry.insert("meta-type".into(), meta.into());
        Value::Object(entry)
    }

    fn members(&mut self, members: &[&'static Member]) -> Vec<Value> {
        let one = |m: &&'static Member| {
            let mut v = json!({"name": m.name, "type": self.name((m.ty)())});
            if m.optional {
                v["default"] = Value::Null;
            }
            put_features(&mut v, m.features);
            v
        };
        members.iter().map(one).collect()
    }

    fn variants(&mut self, branches: &'static [Branch]) -> Vec<Value> {
        branches.iter().map(|b| json!({"case": b.name, "type": self.name((b.ty)())})).collect()
    }
}

fn put_features(entry: &mut Value, features: &[&str]) {
    if !features.is_empty() {
        entry["features"] = features.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Qapi;
    use crate::options::blockdev::BlockdevOptions;
    use crate::options::types::Empty;

    /// Goal: shapes are those of the peer's list. Method: the entries of one command, closed under references.
    #[test]
    fn one_command() {
        let mut schema = Schema::default();
        schema.command("blockdev-add", BlockdevOptions::ty(), Empty::ty(), &[]);
        let list = schema.finish();
        let find = |name: &str| list.iter().find(|e| e["name"] == name).unwrap();
        let command = find("blockdev-add");
        let args = find(command["arg-type"].as_str().unwrap());
        assert_eq!(args["tag"], "driver");
        assert_eq!(args["members"][0]["name"], "driver");
        assert_eq!(args["members"][1], json!({"name": "node-name", "type": "str", "default": null}));
        let raw = args["variants"].as_array().unwrap().iter().find(|v| v["case"] == "raw").unwrap();
        let file = &find(raw["type"].as_str().unwrap())["members"][0];
        assert_eq!(find(file["type"].as_str().unwrap())["meta-type"], "alternate");
        assert_eq!(find(command["ret-type"].as_str().unwrap())["members"], json!([]));
        let names: BTreeSet<_> = list.iter().map(|e| e["name"].as_str().unwrap()).collect();
        assert_eq!(names.len(), list.len(), "names are unique");
    }
}
