//! Hostile clients of the control socket.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringblock_tests::Rng;

/// One hostile client: what number `n` does. Whether it is answered does not matter.
pub(super) fn attack(path: &str, n: u64, rng: &mut Rng) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    let limit = Some(Duration::from_millis(300));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    let hello = b"{\"execute\":\"qmp_capabilities\"}\n";
    let bytes: Vec<u8> = match n % 12 {
        0 => return Ok(()),
        1 => {
            let mut garbage = vec![0; 4096];
            rng.fill(&mut garbage);
            garbage
        }
        2 => b"[".repeat(100_000),
        3 => b"{\"a\":".repeat(50_000),
        4 => [b"{\"execute\":\"".as_slice(), &vec![b'x'; 2 << 20]].concat(),
        5 => b"{\"execute\":\"query-block-nodes\"}\n".repeat(500),
        6 => [hello.as_slice(), &b"{\"execute\":\"query-qmp-schema\"}\n".repeat(50)].concat(),
        7 => [hello.as_slice(), b"{\"execute\":\"query-named-block-nodes\",\"arguments\":{\"x\":".as_slice(), &b"[".repeat(900)].concat(),
        8 => [hello.as_slice(), b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"qcow2\",\"node-name\":\"\\ud800\"}}\n"].concat(),
        9 => b"{\"execute\": 1e999999}\n{\"execute\":\"quit\"\n\xff\xfe\x00\n".to_vec(),
        10 => {
            for byte in &hello[..10] {
                stream.write_all(&[*byte])?;
                std::thread::sleep(Duration::from_millis(2));
            }
            return Ok(());
        }
        _ => {
            stream.write_all(&hello[..12])?;
            stream.shutdown(Shutdown::Write)?;
            Vec::new()
        }
    };
    let sent = stream.write_all(&bytes);
    // some never take their answers
    if n % 24 < 12 {
        let mut buf = [0; 16 << 10];
        while matches!(stream.read(&mut buf), Ok(got) if got > 0) {}
    }
    sent
}
