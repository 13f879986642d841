//! A small QMP client: one connection, commands in order, events kept until asked for.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A negotiated control connection.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: VecDeque<Value>,
    next_id: u64,
}

/// What a failed command answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// The error class, such as `GenericError`.
    pub class: String,
    /// The text.
    pub desc: String,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode.
    ///
    /// # Panics
    /// If the server does not greet within 30 s.
    pub fn connect(path: &str) -> Self {
        let (mut qmp, greeting) = Self::raw(path);
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_number(), "greeting: {greeting}");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Connects and reads the greeting only.
    pub fn raw(path: &str) -> (Self, Value) {
        let writer = UnixStream::connect(path).unwrap_or_else(|e| panic!("connect {path}: {e}"));
        writer.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out can be set");
        let reader = BufReader::new(writer.try_clone().expect("a second handle"));
        let mut qmp = Self { reader, writer, events: VecDeque::new(), next_id: 0 };
        let greeting = qmp.receive().expect("a greeting");
        (qmp, greeting)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, text: &str) {
        self.writer.write_all(text.as_bytes()).expect("the control socket takes bytes");
    }

    /// The next message of any kind; `None` at the end of the connection.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        let n = self.reader.read_line(&mut line).expect("a message within 30 s");
        if n == 0 {
            return None;
        }
        assert!(line.is_ascii() && line.ends_with("\r\n"), "not ASCII with CRLF: {line:?}");
        Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("not JSON ({e}): {line:?}")))
    }

    /// The next message that is not an event.
    pub fn reply(&mut self) -> Value {
        loop {
            let message = self.receive().expect("a reply, not the end of the connection");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    /// Runs one command.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.next_id += 1;
        let id = self.next_id;
        self.send(&format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id })));
        let reply = self.reply();
        assert_eq!(reply["id"], json!(id), "the id comes back: {reply}");
        if let Some(error) = reply.get("error") {
            let text = |key: &str| error[key].as_str().unwrap_or_default().to_string();
            return Err(QmpError { class: text("class"), desc: text("desc") });
        }
        Ok(reply["return"].clone())
    }

    /// Runs one command that must succeed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, arguments.clone())
            .unwrap_or_else(|e| panic!("{command} {arguments}: {}: {}", e.class, e.desc))
    }

    /// Runs one command that must fail; returns the error.
    pub fn refuse(&mut self, command: &str, arguments: Value) -> QmpError {
        match self.execute(command, arguments.clone()) {
            Err(error) => error,
            Ok(value) => panic!("{command} {arguments} should fail, but returned {value}"),
        }
    }

    /// The data of the next event called `name`, waiting for it; other events are dropped.
    pub fn event(&mut self, name: &str) -> Value {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < Duration::from_secs(30), "no {name} event");
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive().expect("an event, not the end of the connection"),
            };
            assert!(event["timestamp"]["seconds"].is_number(), "an event has a time: {event}");
            if event["event"] == name {
                return event["data"].clone();
            }
        }
    }

    /// Sends `quit` and reads to the end of the connection.
    pub fn quit(mut self) {
        self.send("{\"execute\": \"quit\"}\n");
        // The answer may be lost in the race with the end of the process; a close is an answer too.
        let mut line = String::new();
        while matches!(self.reader.read_line(&mut line), Ok(n) if n > 0) {
            line.clear();
        }
    }
}
