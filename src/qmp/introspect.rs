//! What the control pipe tells about itself: its version, its commands, its schema.

use super::dispatch::Registry;
use ringblock_drivers::options::schema::Schema;
use ringblock_drivers::options::types::Empty;
use ringblock_drivers::options::{Value, from_json};
use ringblock_engine::error::Error;

/// The QEMU release whose control pipe this one follows.
const LEVEL: (u64, u64, u64) = (10, 0, 2);

ringblock_drivers::qapi! {
    /// What a client may switch on.
    enum QmpCapability {
        /// Commands out of order, for those that allow it (none does).
        Oob = "oob",
    }

    /// Arguments of qmp_capabilities.
    struct QmpCapabilitiesArgs: Default {
        /// What to switch on (default: nothing).
        enable: Option<Vec<QmpCapability>> = "enable",
    }

    /// A version in three parts.
    struct VersionTriple {
        /// First part.
        major: u64 = "major",
        /// Second part.
        minor: u64 = "minor",
        /// Third part.
        micro: u64 = "micro",
    }

    /// Which program this is.
    struct VersionInfo {
        /// The release of QEMU whose control pipe this one follows.
        qemu: VersionTriple = "qemu",
        /// The program and its own version.
        package: String = "package",
    }

    /// A command.
    struct CommandInfo {
        /// Its name.
        name: String = "name",
    }

    /// A word of an enumeration.
    struct SchemaInfoEnumMember {
        /// The word.
        name: String = "name",
    }

    /// A member of an object.
    struct SchemaInfoObjectMember {
        /// Its name.
        name: String = "name",
        /// Its type.
        ty: String = "type",
        /// There (as null) if it may be left out.
        default: Option<Value> = "default",
        /// Marks.
        features: Option<Vec<String>> = "features",
    }

    /// A branch of an object.
    struct SchemaInfoObjectVariant {
        /// The word that selects it.
        case: String = "case",
        /// The type with its members.
        ty: String = "type",
    }

    /// A type that an alternate may be.
    struct SchemaInfoAlternateMember {
        /// The type.
        ty: String = "type",
    }

    /// A type of JSON.
    struct SchemaInfoBuiltin {
        /// Which.
        json_type: JsonType = "json-type",
    }

    /// The types of JSON.
    enum JsonType {
        /// A string.
        String = "string",
        /// A number.
        Number = "number",
        /// A whole number.
        Int = "int",
        /// true or false.
        Boolean = "boolean",
        /// null.
        Null = "null",
        /// An object.
        Object = "object",
        /// An array.
        Array = "array",
        /// Any of them.
        Value = "value",
    }

    /// An enumeration.
    struct SchemaInfoEnum {
        /// Its words.
        members: Vec<SchemaInfoEnumMember> = "members",
        /// Its words, in the older form.
        values: Vec<String> = "values" ["deprecated"],
    }

    /// An array.
    struct SchemaInfoArray {
        /// The type of its elements.
        element_type: String = "element-type",
    }

    /// An object.
    struct SchemaInfoObject {
        /// Its members, in no particular order.
        members: Vec<SchemaInfoObjectMember> = "members",
        /// The member that selects a branch.
        tag: Option<String> = "tag",
        /// The branches.
        variants: Option<Vec<SchemaInfoObjectVariant>> = "variants",
    }

    /// One of several types.
    struct SchemaInfoAlternate {
        /// The types.
        members: Vec<SchemaInfoAlternateMember> = "members",
    }

    /// A command.
    struct SchemaInfoCommand {
        /// The type of its arguments.
        arg_type: String = "arg-type",
        /// The type of its answer.
        ret_type: String = "ret-type",
    }

    /// An event.
    struct SchemaInfoEvent {
        /// The type of its data.
        arg_type: String = "arg-type",
    }

    /// What all entries have.
    struct SchemaInfoBase {
        /// The name of a command or event, the number of a type.
        name: String = "name",
        /// Marks.
        features: Option<Vec<String>> = "features",
    }

    /// An entry of the schema.
    union SchemaInfo {
        base: SchemaInfoBase,
        tag meta: SchemaMetaType = "meta-type",
        /// A type of JSON.
        Builtin(SchemaInfoBuiltin) = "builtin",
        /// An enumeration.
        Enum(SchemaInfoEnum) = "enum",
        /// An array.
        Array(SchemaInfoArray) = "array",
        /// An object.
        Object(SchemaInfoObject) = "object",
        /// One of several types.
        Alternate(SchemaInfoAlternate) = "alternate",
        /// A command.
        Command(SchemaInfoCommand) = "command",
        /// An event.
        Event(SchemaInfoEvent) = "event",
    }
}

/// The version that the greeting and query-version tell.
pub fn version() -> VersionInfo {
    let (major, minor, micro) = LEVEL;
    VersionInfo {
        qemu: VersionTriple { major, minor, micro },
        package: concat!("Ringblock ", env!("CARGO_PKG_VERSION")).into(),
    }
}

/// The schema of all that is registered.
pub fn schema<C>(registry: &Registry<C>) -> Result<Vec<SchemaInfo>, Error> {
    let mut schema = Schema::default();
    for (name, command) in registry.commands() {
        schema.command(name, command.args, command.ret, command.features);
    }
    for (name, data) in registry.events() {
        schema.event(name, data);
    }
    from_json(&Value::Array(schema.finish()))
}

/// Adds qmp_capabilities, query-version, query-commands and query-qmp-schema.
pub fn register<C: 'static>(registry: &mut Registry<C>) {
    // The session answers this one itself while it negotiates; here it is for introspection.
    registry.command("qmp_capabilities", |_, _: QmpCapabilitiesArgs| Ok(Empty {}));
    registry.command("query-version", |_, _: Empty| Ok(version()));
    registry.command("query-commands", |call, _: Empty| {
        Ok(call.registry.commands().map(|(name, _)| CommandInfo { name: name.into() }).collect::<Vec<_>>())
    });
    registry.command("query-qmp-schema", |call, _: Empty| schema(call.registry));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Goal: the schema describes itself and has no dangling names. Method: collect all names and all references.
    #[test]
    fn closed_under_references() {
        let mut registry: Registry<()> = Registry::default();
        register(&mut registry);
        registry.event::<VersionInfo>("TEST");
        let list = schema(&registry).unwrap();
        let names: BTreeSet<_> = list.iter().map(|e| e.base.name.as_str()).collect();
        assert_eq!(names.len(), list.len());
        let mut used: Vec<&str> = Vec::new();
        for e in &list {
            match &e.meta {
                SchemaMetaType::Builtin(_) | SchemaMetaType::Enum(_) => {}
                SchemaMetaType::Array(a) => used.push(&a.element_type),
                SchemaMetaType::Object(o) => {
                    used.extend(o.members.iter().map(|m| m.ty.as_str()));
                    used.extend(o.variants.iter().flatten().map(|v| v.ty.as_str()));
                }
                SchemaMetaType::Alternate(a) => used.extend(a.members.iter().map(|m| m.ty.as_str())),
                SchemaMetaType::Command(c) => used.extend([c.arg_type.as_str(), c.ret_type.as_str()]),
                SchemaMetaType::Event(e) => used.push(&e.arg_type),
            }
        }
        assert!(used.len() > 30);
        for name in used {
            assert!(names.contains(name), "{name}");
        }
    }
}
