//! What hostile clients do. Each attack is one connection (a flood: many) and gives back those that stay open.
//!
//! Attacks write only behind [`FREE`], so that the good client can tell whether its data are what it wrote.

use std::io::{self, Read, Write};

use ringblock_tests::Rng;

use super::wire::{Address, Stream, contexts, extended, go, option, option_of, request};

/// Where attackers may write.
pub(super) const FREE: u64 = 32 << 20;
/// Bytes of the disk.
pub(super) const SIZE: u64 = 64 << 20;

/// An attack: connections that it leaves open are held for a while.
type Attack = fn(&Address, &mut Rng) -> io::Result<Vec<Stream>>;

/// All of them; each takes its turn.
pub(super) const ATTACKS: &[(&str, Attack)] = &[
    ("connect and leave", |to, _| to.connect().map(|_| Vec::new())),
    ("connect and stay silent", |to, _| to.connect().map(|s| vec![s])),
    ("greeting and leave", |to, _| to.greeted().map(|_| Vec::new())),
    ("wrong client flags", |to, _| say(to, false, &u32::MAX.to_be_bytes())),
    ("garbage", |to, rng| {
        let mut bytes = vec![0; 1 + rng.below(8192) as usize];
        rng.fill(&mut bytes);
        say(to, rng.chance(50), &bytes)
    }),
    ("HTTP", |to, _| say(to, false, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
    ("wrong option magic", |to, _| say(to, true, &[b"IHAVEOPX".as_slice(), &[0; 8]].concat())),
    ("an option of 4 GiB", |to, rng| say(to, true, &option_of(rng.below(12) as u32, u32::MAX, &[1; 100]))),
    ("an option of 1 MiB, cut off", |to, _| say(to, true, &option_of(7, 1 << 20, &[0; 5000]))),
    ("unknown options", |to, rng| {
        let all: Vec<u8> = (0..40).flat_map(|_| option(100 + rng.below(1 << 30) as u32, b"abc")).collect();
        say(to, true, &all)
    }),
    ("options out of order", |to, rng| {
        let mut all = Vec::new();
        for _ in 0..8 {
            all.extend(match rng.below(7) {
                0 => option(8, b""),
                1 => option(11, b""),
                2 => option(8, b"data"),
                3 => contexts(b"d", &[b"base:allocation", b"qemu:allocation-depth", b"x"]),
                4 => option(9, &[0; 8]),
                5 => option(5, b""),
                _ => go(b"nothing"),
            });
        }
        say(to, true, &all)
    }),
    ("lists", |to, _| say(to, true, &option(3, b"").repeat(100))),
    ("contexts that lie", |to, rng| {
        let mut data = [&1u32.to_be_bytes()[..], b"d", &[0xff; 8]].concat();
        data.truncate(rng.below(14) as usize);
        say(to, true, &[option(8, b""), option(10, &data)].concat())
    }),
    ("export names", |to, rng| {
        let name = vec![b'n'; [1, 255, 4095, 4096, 4097, 60_000][rng.below(6) as usize]];
        say(to, true, &[go(&name), option(6, &[0; 3]), option(1, &name)].concat())
    }),
    ("STARTTLS and plain text", |to, _| {
        say(to, true, &[option(5, b""), go(b"d"), request(0, 0, 1, 0, 512)].concat())
    }),
    ("byte by byte", |to, rng| {
        let mut stream = to.greeted()?;
        stream.write_all(&go(b"d")[..1 + rng.below(20) as usize])?;
        Ok(vec![stream])
    }),
    ("half closed in the options", |to, _| {
        let stream = to.greeted()?;
        stream.half_close()?;
        Ok(vec![stream])
    }),
    ("half closed with reads in flight", |to, rng| {
        let mut stream = entered(to)?;
        stream.write_all(&reads(16, 64 << 10, rng))?;
        stream.half_close()?;
        stream.drain();
        Ok(vec![stream])
    }),
    ("reads that are never taken", |to, rng| {
        let mut stream = entered(to)?;
        stream.patience(std::time::Duration::from_millis(20))?;
        let _ = stream.write_all(&reads(64, 256 << 10, rng));
        Ok(vec![stream])
    }),
    ("a wrong request magic", |to, _| in_session(to, &[0x42; 28])),
    ("requests out of range", |to, rng| {
        let mut stream = entered(to)?;
        let offsets = [SIZE, SIZE - 512, SIZE + 1, u64::MAX, u64::MAX - 511, 1 << 63, (1 << 63) - 1];
        let lengths = [1024, u32::MAX, 1 << 31, 33 << 20];
        for _ in 0..12 {
            // no writes: their data would have to follow
            let command = *rng.pick(&[0u16, 3, 4, 5, 6, 7, 8, 99, u16::MAX]);
            let (off, len) = (*rng.pick(&offsets), *rng.pick(&lengths));
            stream.write_all(&request(rng.next_u64() as u16 & 0x3f, command, 7, off, len))?;
        }
        stream.drain();
        Ok(Vec::new())
    }),
    ("writes out of range", |to, rng| {
        let off = *rng.pick(&[SIZE, u64::MAX, SIZE - 100, 1 << 63]);
        in_session(to, &[request(0, 1, 1, off, 4096), vec![9; 4096], request(0, 0, 2, 0, 512)].concat())
    }),
    ("a write of 4 GiB", |to, _| in_session(to, &[request(0, 1, 1, FREE, u32::MAX), vec![9; 4096]].concat())),
    ("a write cut off", |to, rng| {
        let mut stream = entered(to)?;
        stream.write_all(&[request(0, 1, 1, FREE, 1 << 20), vec![9; 1000]].concat())?;
        Ok(if rng.chance(50) { vec![stream] } else { Vec::new() })
    }),
    ("extended headers, then short ones", |to, rng| {
        let mut stream = to.greeted()?;
        stream.write_all(&[option(11, b""), go(b"d")].concat())?;
        stream.write_all(&reads(4, 512, rng))?;
        stream.drain();
        Ok(Vec::new())
    }),
    ("extended headers misused", |to, rng| {
        let mut stream = to.greeted()?;
        stream.write_all(&[option(11, b""), contexts(b"d", &[b"base:allocation"]), go(b"d")].concat())?;
        for i in 0..8 {
            let command = *rng.pick(&[0u16, 4, 5, 6, 7, 50]);
            let (off, len) = (FREE + (rng.next_u64() >> rng.below(64)), rng.next_u64() >> rng.below(64));
            stream.write_all(&extended(rng.next_u64() as u16 & 0x3f, command, i, off, len))?;
        }
        stream.drain();
        Ok(Vec::new())
    }),
    ("short headers, then extended ones", |to, _| in_session(to, &extended(0, 0, 1, 0, 512))),
    ("a flood of block status", |to, _| {
        let mut stream = to.greeted()?;
        let all = contexts(b"d", &[b"base:allocation", b"qemu:allocation-depth"]);
        stream.write_all(&[option(8, b""), all, go(b"d")].concat())?;
        stream.patience(std::time::Duration::from_millis(20))?;
        let flood: Vec<u8> = (0..200).flat_map(|i| request(0, 7, i, 0, SIZE as u32)).collect();
        let _ = stream.write_all(&flood);
        Ok(vec![stream])
    }),
    ("disconnect with writes in flight", |to, rng| {
        let mut stream = entered(to)?;
        let mut all = Vec::new();
        for i in 0..8 {
            all.extend(request(rng.below(2) as u16, 1, i, FREE + (rng.below(1000) << 12), 4096));
            all.extend([3; 4096]);
        }
        all.extend(request(0, 2, 9, 0, 0));
        stream.write_all(&all)?;
        Ok(Vec::new())
    }),
    ("leave with requests in flight", |to, rng| {
        let mut stream = entered(to)?;
        let mut all = reads(16, 64 << 10, rng);
        for command in [3, 4, 6] {
            all.extend(request(0, command, 1, FREE, 1 << 20));
        }
        stream.write_all(&all)?;
        Ok(Vec::new())
    }),
    ("random requests", |to, rng| {
        let mut stream = entered(to)?;
        for _ in 0..6 {
            let command = [0, 2, 3, 5, 7, 8, 9, 13][rng.below(8) as usize];
            stream.write_all(&request(
                rng.next_u64() as u16,
                command,
                1,
                rng.next_u64() >> rng.below(64),
                rng.next_u64() as u32,
            ))?;
        }
        stream.drain();
        Ok(Vec::new())
    }),
    ("more connections than there is room for", |to, rng| {
        // few of them, as each counts for as many clients as it has connections
        if !rng.chance(3) {
            return to.connect().map(|_| Vec::new());
        }
        let mut held = Vec::new();
        for _ in 0..40 {
            held.push(to.connect()?);
        }
        Ok(held)
    }),
];

/// Connects, perhaps up to the options, says something, and takes what is answered.
fn say(to: &Address, greeted: bool, bytes: &[u8]) -> io::Result<Vec<Stream>> {
    let mut stream = if greeted { to.greeted()? } else { to.connect()? };
    stream.write_all(bytes)?;
    stream.drain();
    Ok(Vec::new())
}

/// Says something in a session and takes what is answered.
fn in_session(to: &Address, bytes: &[u8]) -> io::Result<Vec<Stream>> {
    let mut stream = entered(to)?;
    stream.write_all(bytes)?;
    stream.drain();
    Ok(Vec::new())
}

/// A connection in the transmission phase, with simple replies.
fn entered(to: &Address) -> io::Result<Stream> {
    let mut stream = to.greeted()?;
    stream.write_all(&go(b"d"))?;
    // replies are 20 bytes and data, the last one is an acknowledgement
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut data = vec![0; word(16) as usize & 0xffff];
        stream.read_exact(&mut data)?;
        match word(12) {
            1 => return Ok(stream),
            kind if kind >> 31 != 0 => return Err(io::Error::other("refused")),
            _ => {}
        }
    }
}

/// Reads, in a row.
fn reads(count: u64, len: u32, rng: &mut Rng) -> Vec<u8> {
    (0..count)
        .flat_map(|i| request(0, 0, i, rng.below(SIZE / u64::from(len)) * u64::from(len), len))
        .collect()
}
