//! The rules of one client's session: greeting, negotiation, one answer for each message.
//!
//! ```text
//!            qmp_capabilities
//! negotiating ───────────────► commands        a failed negotiation changes nothing
//! ```
//!
//! Texts and classes are those of QMP as `qemu-storage-daemon` 10.0 answers.

use super::dispatch::{Registry, not_found};
use super::introspect::{QmpCapabilitiesArgs, QmpCapability, version};
use ringblock_drivers::options::{Map, Qapi, Value, from_json, json};
use ringblock_engine::error::{Error, ErrorClass};
use serde_json::json;
use std::sync::Arc;

/// One client's session, without its connection.
pub struct Session<C> {
    registry: Arc<Registry<C>>,
    context: Arc<C>,
    reader: json::Reader,
    negotiated: bool,
    oob: bool,
}

/// A command as it was asked for.
struct Asked {
    name: String,
    args: Value,
    oob: bool,
}

impl<C> Session<C> {
    /// A session that has just begun.
    pub fn new(registry: Arc<Registry<C>>, context: Arc<C>) -> Session<C> {
        Session { registry, context, reader: json::Reader::default(), negotiated: false, oob: false }
    }

    /// What a client is told first.
    pub fn greeting() -> Value {
        json!({"QMP": {"version": version().write(), "capabilities": ["oob"]}})
    }

    /// Whether negotiation is over; events are only for such clients.
    pub fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Takes input and gives an answer for every message that it completes, in order.
    pub fn feed(&mut self, input: &[u8], answer: &mut dyn FnMut(Value, bool)) {
        // A message is answered before the next is looked at: it may change the mode of the session.
        for byte in input {
            let mut messages = Vec::new();
            self.reader.feed(std::slice::from_ref(byte), &mut |m| messages.push(m));
            for message in messages {
                let reply = self.message(message);
                answer(reply, self.negotiated);
            }
        }
    }

    fn message(&mut self, message: Result<Value, Error>) -> Value {
        let mut id = None;
        let result = message.and_then(|m| {
            let Value::Object(m) = m else {
                return Err(Error::invalid("QMP input must be a JSON object"));
            };
            id = m.get("id").cloned();
            let asked = self.understand(m)?;
            self.execute(&asked)
        });
        let mut reply = Map::new();
        match result {
            Ok(value) => reply.insert("return".into(), value),
            Err(e) => reply.insert("error".into(), json!({"class": class_name(e.class), "desc": e.message})),
        };
        if let Some(id) = id {
            reply.insert("id".into(), id);
        }
        Value::Object(reply)
    }

    fn understand(&self, message: Map<String, Value>) -> Result<Asked, Error> {
        let mut asked: Option<(String, bool)> = None;
        let mut args = None;
        for (key, value) in message {
            match key.as_str() {
                "execute" | "exec-oob" if key == "execute" || self.oob => {
                    let Value::String(name) = value else {
                        return Err(Error::invalid(format!("QMP input member '{key}' must be a string")));
                    };
                    if asked.is_some() {
                        return Err(Error::invalid("QMP input member 'execute' clashes with 'exec-oob'"));
                    }
                    asked = Some((name, key == "exec-oob"));
                }
                "arguments" if value.is_object() => args = Some(value),
                "arguments" => {
                    return Err(Error::invalid("QMP input member 'arguments' must be an object"));
                }
                "id" => {}
                _ => return Err(Error::invalid(format!("QMP input member '{key}' is unexpected"))),
            }
        }
        let (name, oob) = asked.ok_or_else(|| Error::invalid("QMP input lacks member 'execute'"))?;
        Ok(Asked { name, args: args.unwrap_or_else(|| json!({})), oob })
    }

    fn execute(&mut self, asked: &Asked) -> Result<Value, Error> {
        let refuse = |text: &str| Err(Error::invalid(text).with_class(ErrorClass::CommandNotFound));
        match (self.negotiated, asked.name == "qmp_capabilities") {
            (false, true) => self.negotiate(&asked.args),
            (false, false) => refuse("Expecting capabilities negotiation with 'qmp_capabilities'"),
            (true, true) => refuse("Capabilities negotiation is already complete, command ignored"),
            (true, false) if asked.oob && !self.registry.has(&asked.name) => Err(not_found(&asked.name)),
            (true, false) if asked.oob => {
                Err(Error::invalid(format!("The command {} does not support OOB", asked.name)))
            }
            (true, false) => self.registry.run(&self.context, &asked.name, &asked.args),
        }
    }

    fn negotiate(&mut self, args: &Value) -> Result<Value, Error> {
        let args: QmpCapabilitiesArgs = from_json(args)?;
        self.oob = args.enable.is_some_and(|list| list.contains(&QmpCapability::Oob));
        self.negotiated = true;
        Ok(json!({}))
    }
}

fn class_name(class: ErrorClass) -> &'static str {
    match class {
        ErrorClass::GenericError => "GenericError",
        ErrorClass::CommandNotFound => "CommandNotFound",
        ErrorClass::DeviceNotActive => "DeviceNotActive",
        ErrorClass::DeviceNotFound => "DeviceNotFound",
    }
}

#[cfg(test)]
mod tests {
    use super::super::introspect;
    use super::*;

    fn ask(session: &mut Session<()>, input: &str) -> Vec<Value> {
        let mut out = Vec::new();
        session.feed(input.as_bytes(), &mut |v, _| out.push(v));
        out
    }

    fn session() -> Session<()> {
        let mut registry = Registry::default();
        introspect::register(&mut registry);
        Session::new(Arc::new(registry), Arc::new(()))
    }

    /// Goal: the peer's answers. Method: a transcript recorded from it; `desc` or `return` of each message.
    #[test]
    fn transcript() {
        let mut s = session();
        for (input, want) in [
            ("{'execute':'query-version'}", "Expecting capabilities negotiation with 'qmp_capabilities'"),
            ("{'execute':'nope'}", "Expecting capabilities negotiation with 'qmp_capabilities'"),
            (
                "{'execute':'qmp_capabilities','arguments':{'enable':['foo']}}",
                "Parameter 'enable[0]' does not accept value 'foo'",
            ),
            ("{'exec-oob':'query-version'}", "QMP input member 'exec-oob' is unexpected"),
            ("{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}", "{}"),
            (
                "{'execute':'qmp_capabilities'}",
                "Capabilities negotiation is already complete, command ignored",
            ),
            ("[1]", "QMP input must be a JSON object"),
            ("{'execute':'quit2'}", "The command quit2 has not been found"),
            ("{'execute':1}", "QMP input member 'execute' must be a string"),
            ("{'execute':'query-version','foo':1}", "QMP input member 'foo' is unexpected"),
            ("{}", "QMP input lacks member 'execute'"),
            ("{'execute':'query-version','arguments':[]}", "QMP input member 'arguments' must be an object"),
            ("{'execute':'query-version','arguments':{'a':1}}", "Parameter 'a' is unexpected"),
            ("{'exec-oob':'query-version'}", "The command query-version does not support OOB"),
            ("{'exec-oob':'nope'}", "The command nope has not been found"),
            ("{'execute':'a','exec-oob':'b'}", "QMP input member 'execute' clashes with 'exec-oob'"),
        ] {
            let got = ask(&mut s, input);
            assert_eq!(got.len(), 1, "{input}");
            let text = match got[0].get("error") {
                Some(e) => e["desc"].as_str().unwrap().to_owned(),
                None => got[0]["return"].to_string(),
            };
            assert_eq!(text, want, "{input}");
        }
    }

    /// Goal: ids come back with every kind of answer, several messages in one read are answered in order.
    #[test]
    fn ids_and_order() {
        let mut s = session();
        let got = ask(
            &mut s,
            "{'execute':'qmp_capabilities','id':1} {'execute':'x','id':{'a':[]}} @ \n{'id':null}{'execute':'query-version'}",
        );
        let ids: Vec<_> = got.iter().map(|v| v.get("id").cloned()).collect();
        assert_eq!(ids, [Some(json!(1)), Some(json!({"a": []})), None, Some(Value::Null), None]);
        assert_eq!(got[1]["error"]["class"], "CommandNotFound");
        assert!(got[4]["return"]["qemu"]["major"].is_u64());
    }
}
