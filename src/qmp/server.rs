//! Clients of the control pipe: two threads each, one that reads and executes, one that writes.
//!
//! ```text
//! listening socket ─ accept thread ─► client ┬ reader: bytes ─► session ─► answer ─┐
//!                                            └ writer: connection ◄── outbox ◄─────┴── events
//! ```
//!
//! At most [`MAX_CLIENTS`] are served at a time on one socket; more are sent away at once. A socket that is read too
//! slowly stops its own reader only (see `outbox`).

use super::dispatch::Registry;
use super::events::{Events, Listener};
use super::outbox::Outbox;
use super::session::Session;
use ringblock_drivers::options::json::MAX_NESTING;
use ringblock_engine::error::{Errno, Error};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// Clients served at a time on one listening socket.
pub const MAX_CLIENTS: usize = 16;
/// How long a client gets to read its last answers when the program ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Messages nest, and their reader recurses: this much for each level.
const STACK: usize = 512 * 1024 + MAX_NESTING * 2048;

/// Everything that serves the clients of one program.
pub struct Server<C> {
    registry: Arc<Registry<C>>,
    context: Arc<C>,
    events: Events,
    clients: Arc<Mutex<Vec<Weak<Listener>>>>,
    listeners: Arc<Mutex<Vec<UnixStream>>>,
    stopping: Arc<AtomicBool>,
}

impl<C> Clone for Server<C> {
    fn clone(&self) -> Self {
        Server {
            registry: self.registry.clone(),
            context: self.context.clone(),
            events: self.events.clone(),
            clients: self.clients.clone(),
            listeners: self.listeners.clone(),
            stopping: self.stopping.clone(),
        }
    }
}

impl<C: Send + Sync + 'static> Server<C> {
    /// A server without clients.
    pub fn new(registry: Registry<C>, context: Arc<C>, events: Events) -> Server<C> {
        Server {
            registry: Arc::new(registry),
            context,
            events,
            clients: Arc::default(),
            listeners: Arc::default(),
            stopping: Arc::default(),
        }
    }

    /// Serves the clients of a listening socket (unix or TCP) from threads of its own. `pretty` indents the output.
    pub fn listen(&self, socket: OwnedFd, pretty: bool) -> Result<(), Error> {
        let failed = |e: std::io::Error| Error::io(Errno::of(&e), "Could not serve a monitor socket");
        // Only ever shut down, which works alike for TCP.
        let closer = UnixStream::from(socket.try_clone().map_err(failed)?);
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(closer);
        let socket = Acceptor::new(socket);
        let server = self.clone();
        let count = Arc::new(AtomicUsize::new(0));
        spawn("qmp-accept", move || {
            while !server.stopping.load(Ordering::Acquire) {
                match socket.accept() {
                    Ok(stream) => server.admit(stream, pretty, &count),
                    // Out of descriptors, most likely: others may close theirs.
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        })
    }

    fn admit(&self, stream: UnixStream, pretty: bool, count: &Arc<AtomicUsize>) {
        if count.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
            count.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let left = Counted(count.clone());
        // On failure the connection is closed, which is all that can be done for it.
        let _ = self.connected(stream, pretty, left);
    }

    /// Serves one connected socket.
    pub fn connect(&self, socket: OwnedFd, pretty: bool) -> Result<(), Error> {
        self.connected(UnixStream::from(socket), pretty, ())
    }

    fn connected(&self, stream: UnixStream, pretty: bool, held: impl Send + 'static) -> Result<(), Error> {
        let failed = |e: std::io::Error| Error::io(Errno::of(&e), "Could not serve a monitor client");
        let closer = stream.try_clone().map_err(failed)?;
        let input = File::from(OwnedFd::from(stream.try_clone().map_err(failed)?));
        let output = File::from(OwnedFd::from(stream));
        let disconnect = Box::new(move || {
            let _ = closer.shutdown(Shutdown::Both);
        });
        self.serve(input, output, pretty, disconnect, held)
    }

    /// Serves standard input and output. The end of the input ends the session, not the program.
    pub fn stdio(&self, pretty: bool) -> Result<(), Error> {
        let dup = |fd: std::io::Result<OwnedFd>| {
            fd.map(File::from)
                .map_err(|e| Error::io(Errno::of(&e), "Could not use standard input and output"))
        };
        let input = dup(std::io::stdin().as_fd().try_clone_to_owned())?;
        let output = dup(std::io::stdout().as_fd().try_clone_to_owned())?;
        self.serve(input, output, pretty, Box::new(|| {}), ())
    }

    fn serve(
        &self,
        input: File,
        output: File,
        pretty: bool,
        disconnect: Box<dyn Fn() + Send + Sync>,
        held: impl Send + 'static,
    ) -> Result<(), Error> {
        let client = Arc::new(Listener {
            outbox: Outbox::default(),
            pretty,
            negotiated: AtomicBool::new(false),
            disconnect,
        });
        client.outbox.send(client.format(&Session::<C>::greeting()));
        self.events.subscribe(&client);
        {
            let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
            clients.retain(|c| c.strong_count() > 0);
            clients.push(Arc::downgrade(&client));
        }
        let session = Session::new(self.registry.clone(), self.context.clone());
        let writer = client.clone();
        spawn("qmp-write", move || write_all(output, &writer))?;
        spawn("qmp-read", move || {
            // However reading ends, a panic included: the client is not left waiting.
            let _end = End(client.clone());
            read_all(input, session, &client);
            drop(held);
        })
    }

    /// Ends: no new clients, and those connected get their last answers, then are disconnected.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for listener in self.listeners.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Wakes the thread that accepts.
            let _ = listener.shutdown(Shutdown::Both);
        }
        let clients = std::mem::take(&mut *self.clients.lock().unwrap_or_else(PoisonError::into_inner));
        for client in clients.iter().filter_map(Weak::upgrade) {
            client.outbox.drain(LAST_WORDS);
            client.outbox.abandon();
            (client.disconnect)();
        }
    }
}

/// Takes no more output for a client when its reader is gone.
struct End(Arc<Listener>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.outbox.close();
    }
}

/// A listening socket of either kind.
pub(crate) enum Acceptor {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Acceptor {
    pub(crate) fn new(socket: OwnedFd) -> Acceptor {
        let unix = UnixListener::from(socket);
        match unix.local_addr() {
            Ok(_) => Acceptor::Unix(unix),
            Err(_) => Acceptor::Tcp(TcpListener::from(OwnedFd::from(unix))),
        }
    }

    /// Only read, written and shut down from here on, which works alike for TCP.
    pub(crate) fn accept(&self) -> std::io::Result<UnixStream> {
        match self {
            Acceptor::Unix(l) => l.accept().map(|(s, _)| s),
            Acceptor::Tcp(l) => l.accept().map(|(s, _)| UnixStream::from(OwnedFd::from(s))),
        }
    }
}

/// Counts a client off when it is gone.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(f);
    thread.map(drop).map_err(|e| Error::io(Errno::of(&e), "Could not start a thread"))
}

fn read_all<C>(mut input: File, mut session: Session<C>, client: &Listener) {
    let mut chunk = vec![0; 16 << 10];
    loop {
        let n = match input.read(&mut chunk) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut alive = true;
        session.feed(&chunk[..n], &mut |answer, negotiated| {
            alive = client.outbox.send(client.format(&answer));
            // After the answer to qmp_capabilities, so that no event comes before it.
            client.negotiated.store(negotiated, Ordering::Release);
        });
        if !alive {
            return;
        }
    }
}

fn write_all(mut output: File, client: &Listener) {
    while let Some(text) = client.outbox.next() {
        if output.write_all(text.as_bytes()).is_err() {
            client.outbox.abandon();
        }
    }
    (client.disconnect)();
}

#[cfg(test)]
mod tests {
    use super::super::introspect;
    use super::*;
    use ringblock_drivers::options::types::Empty;
    use std::io::{BufRead, BufReader};

    fn server() -> (Server<()>, Events) {
        let events = Events::default();
        let mut registry = Registry::default();
        introspect::register(&mut registry);
        let told = events.clone();
        registry.command("poke", move |_, _: Empty| {
            told.emit("POKED", &Empty {});
            Ok(Empty {})
        });
        (Server::new(registry, Arc::new(()), events.clone()), events)
    }

    fn client(server: &Server<()>) -> BufReader<UnixStream> {
        let (a, b) = UnixStream::pair().unwrap();
        server.connect(b.into(), false).unwrap();
        a.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut client = BufReader::new(a);
        assert!(line(&mut client).starts_with("{\"QMP\": "));
        client
    }

    fn line(client: &mut BufReader<UnixStream>) -> String {
        let mut text = String::new();
        client.read_line(&mut text).unwrap();
        text
    }

    fn say(client: &mut BufReader<UnixStream>, text: &str) {
        client.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// Goal: several clients, each with its own state, all with the events. Method: one pokes, two listen.
    #[test]
    fn several_clients() {
        let (server, _) = server();
        let (mut a, mut b, mut c) = (client(&server), client(&server), client(&server));
        for x in [&mut a, &mut b] {
            say(x, "{'execute':'qmp_capabilities','id':7}\n");
            assert_eq!(line(x), "{\"return\": {}, \"id\": 7}\r\n");
        }
        say(&mut a, "{'execute':'poke'}");
        assert!(line(&mut a).contains("POKED") && line(&mut b).contains("POKED"));
        assert_eq!(line(&mut a), "{\"return\": {}}\r\n");
        say(&mut c, "{'execute':'poke'}");
        assert!(line(&mut c).contains("Expecting capabilities negotiation"));
        server.stop();
        assert_eq!(line(&mut a), "");
    }

    /// Goal: listening sockets of both kinds, and an end of them. Method: connect, greet, stop, connect again.
    #[test]
    fn listening() {
        let (server, _) = server();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = tcp.local_addr().unwrap();
        server.listen(tcp.into(), true).unwrap();
        let mut c = BufReader::new(std::net::TcpStream::connect(addr).unwrap());
        let mut text = String::new();
        c.read_line(&mut text).unwrap();
        assert_eq!(text, "{\r\n");
        server.stop();
        assert!(c.read_to_string(&mut text).is_ok(), "disconnected");
    }

    /// Goal: a client that never reads does not hold up another. Method: flood one with requests and events.
    #[test]
    fn slow_client_does_not_block_others() {
        let (server, events) = server();
        let (mut slow, mut quick) = (client(&server), client(&server));
        for x in [&mut slow, &mut quick] {
            say(x, "{'execute':'qmp_capabilities'}");
            line(x);
        }
        slow.get_mut().set_nonblocking(true).unwrap();
        for _ in 0..2000 {
            if slow.get_mut().write_all(b"{'execute':'query-qmp-schema'}\n").is_err() {
                break;
            }
        }
        let big = "x".repeat(64 << 10);
        for _ in 0..64 {
            events.emit("BIG", &big);
            assert!(line(&mut quick).contains("BIG"));
        }
        say(&mut quick, "{'execute':'query-version'}");
        assert!(line(&mut quick).contains("return"));
    }

    /// Goal: deep nesting does not end the process. Method: the deepest message that is accepted.
    #[test]
    fn deepest_message() {
        let (server, _) = server();
        let mut c = client(&server);
        say(&mut c, &("{'id':".to_owned() + &"[".repeat(1023) + &"]".repeat(1023) + "}"));
        assert!(line(&mut c).contains("lacks member"));
    }
}
