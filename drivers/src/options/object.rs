//! Objects: things with an id that other options refer to.

use super::throttle::ThrottleGroupProperties;
use super::types::Empty;

crate::qapi! {
    /// What every object has.
    struct ObjectOptionsBase {
        /// Its name: a letter, then letters, digits, `-`, `.`, `_`.
        id: String = "id",
    }

    /// An object. Threads here have no polling and no pools of their own, so an iothread has no settings.
    union ObjectOptions {
        base: ObjectOptionsBase,
        tag kind: ObjectType = "qom-type",
        /// One of the engine's cores, given out in turn; exports refer to it.
        Iothread(Empty) = "iothread",
        /// Limits that throttle nodes share.
        ThrottleGroup(Box<ThrottleGroupProperties>) = "throttle-group",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{from_arg, from_json};
    use serde_json::json;

    /// Goal: both spellings, and the texts for mistakes. Method: read them.
    #[test]
    fn both_spellings() {
        let a: ObjectOptions = from_arg("iothread,id=io0", Some("qom-type")).unwrap();
        let b = from_json(&json!({"qom-type": "iothread", "id": "io0"})).unwrap();
        assert_eq!((a.base.id.as_str(), &a), ("io0", &b));
        for (arg, want) in [
            ("nosuch,id=o", "Parameter 'qom-type' does not accept value 'nosuch'"),
            ("iothread", "Parameter 'id' is missing"),
            ("id=io0", "Parameter 'qom-type' is missing"),
            ("iothread,id=io0,nosuch=1", "Parameter 'nosuch' is unexpected"),
            ("iothread,id=io0,poll-max-ns=1", "Parameter 'poll-max-ns' is unexpected"),
            ("{'qom-type':'iothread','id':3}", "Invalid parameter type for 'id', expected: string"),
        ] {
            assert_eq!(from_arg::<ObjectOptions>(arg, Some("qom-type")).unwrap_err().message, want);
        }
    }
}
