//! Tests of the option phase: transcripts of the peer, and hostile input.

use super::*;

struct Two;
impl Two {
    fn d() -> ExportInfo {
        ExportInfo {
            name: "d".into(),
            description: Some("hello".into()),
            size: 1 << 20,
            flags: 0x0d6d,
            block_min: 1,
            block_preferred: 4096,
            depth: true,
        }
    }
    fn ro() -> ExportInfo {
        ExportInfo {
            name: "ro".into(),
            description: None,
            size: 1_000_448,
            flags: 0x050f,
            depth: false,
            ..Two::d()
        }
    }
}
impl Catalogue for Two {
    fn find(&self, name: &[u8]) -> Option<ExportInfo> {
        self.all().into_iter().find(|e| e.name.as_bytes() == name)
    }
    fn all(&self) -> Vec<ExportInfo> {
        vec![Two::d(), Two::ro()]
    }
    fn count(&self) -> usize {
        2
    }
}

fn hex(s: &str) -> Vec<u8> {
    (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
}
fn option(n: u32, data: &[u8]) -> Vec<u8> {
    let mut v = b"IHAVEOPT".to_vec();
    v.extend(n.to_be_bytes());
    v.extend((data.len() as u32).to_be_bytes());
    v.extend(data);
    v
}
fn named(n: &[u8]) -> Vec<u8> {
    [&(n.len() as u32).to_be_bytes(), n].concat()
}
fn go(n: &[u8], items: &[u16]) -> Vec<u8> {
    let mut v = named(n);
    v.extend((items.len() as u16).to_be_bytes());
    items.iter().for_each(|i| v.extend(i.to_be_bytes()));
    v
}
fn queries(n: &[u8], q: &[&[u8]]) -> Vec<u8> {
    let mut v = named(n);
    v.extend((q.len() as u32).to_be_bytes());
    q.iter().for_each(|q| v.extend(named(q)));
    v
}

/// Runs a handshake over everything in `input`, offering at most `window` bytes at once.
fn run(h: &mut Handshake, input: &[u8], window: usize) -> (Vec<u8>, Step, usize) {
    let (mut out, mut at, mut end) = (Vec::new(), 0, window.min(input.len()));
    loop {
        let (n, step) = h.step(&input[at..end], &Two, &mut out);
        at += n;
        match step {
            Step::Again => {}
            Step::More if end == input.len() => return (out, Step::More, at),
            Step::More => end = (end + window).min(input.len()),
            done => return (out, done, at),
        }
    }
}
fn fixed() -> Handshake {
    let mut h = Handshake::new();
    assert_eq!(run(&mut h, &[0, 0, 0, 3], 64).1, Step::More);
    h
}
fn types(mut b: &[u8]) -> Vec<u32> {
    let mut v = Vec::new();
    while !b.is_empty() {
        v.push(be32(b, 12).unwrap());
        b = &b[20 + be32(b, 16).unwrap() as usize..];
    }
    v
}

/// Goal: the replies to every ordinary option equal, byte for byte, those seen from qemu-storage-daemon
/// 10.0.2 serving the same two exports. Method: the recorded transcript, whole and a byte at a time.
#[test]
fn transcripts_equal_the_peers() {
    assert_eq!(Handshake::greeting()[..], hex("4e42444d4147494349484156454f50540003"));
    let cases: &[(Vec<u8>, &str)] = &[
        (
            option(3, b""),
            "0003e889045565a900000003000000020000000a000000016468656c6c6f0003e889045565a900000003000000020000000600000002726f0003e889045565a9000000030000000100000000",
        ),
        (
            option(6, &go(b"d", &[3])),
            "0003e889045565a9000000060000000300000007000268656c6c6f0003e889045565a900000006000000030000000e00030000000100001000020000000003e889045565a900000006000000030000000c000000000000001000000d6d0003e889045565a9000000060000000100000000",
        ),
        (
            option(6, &go(b"ro", &[1, 2, 3])),
            "0003e889045565a900000006000000030000000400 01726f0003e889045565a900000006000000030000000e00030000000100001000020000000003e889045565a900000006000000030000000c000000000000000f4400050f0003e889045565a9000000060000000100000000",
        ),
        (
            option(6, &go(b"zz", &[])),
            "0003e889045565a90000000680000006000000176578706f727420277a7a27206e6f742070726573656e74",
        ),
        (
            option(9, &queries(b"d", &[b"base:"])),
            "0003e889045565a900000009000000040000001300000000626173653a616c6c6f636174696f6e0003e889045565a9000000090000000100000000",
        ),
        (option(8, b""), "0003e889045565a9000000080000000100000000"),
        (
            option(10, &queries(b"d", &[b"base:allocation", b"qemu:allocation-depth"])),
            "0003e889045565a90000000a000000040000001300000000626173653a616c6c6f636174696f6e0003e889045565a90000000a00000004000000190000000171656d753a616c6c6f636174696f6e2d64657074680003e889045565a90000000a0000000100000000",
        ),
        (
            option(7, &go(b"d", &[3])),
            "0003e889045565a9000000070000000300000007000268656c6c6f0003e889045565a900000007000000030000000e00030000000100001000020000000003e889045565a900000007000000030000000c000000000000001000000ded0003e889045565a9000000070000000100000000",
        ),
    ];
    for window in [1, 7, 65536] {
        let mut h = fixed();
        for (ask, want) in cases {
            let (out, _, used) = run(&mut h, ask, window);
            assert_eq!(out, hex(&want.replace(' ', "")), "window {window}");
            assert_eq!(used, ask.len());
        }
    }
}

/// Goal: the old entry works with and without the 124 zeroes, and an unknown name or an error hangs up
/// without a word. Method: the three flag words and several names.
#[test]
fn export_name() {
    for (flags, len) in [(0u32, 134), (1, 134), (2, 10), (3, 10)] {
        let mut h = Handshake::new();
        let input = [&flags.to_be_bytes()[..], &option(1, b"d")].concat();
        let (out, step, _) = run(&mut h, &input, 4096);
        assert_eq!(out.len(), len);
        assert_eq!(out[..10], hex("00000000001000000d6d"));
        assert!(matches!(step, Step::Enter(n) if n.framing == Framing::Simple && n.contexts.is_empty()));
    }
    for name in [&b"zz"[..], b"", &[b'a'; 5000], &[0xff; 4096], &[b'a'; 20000]] {
        let (out, step, _) = run(&mut fixed(), &option(1, name), 65536);
        assert_eq!((out.len(), step), (0, Step::Close));
    }
    let mut h = Handshake::new();
    assert_eq!(run(&mut h, &[&[0, 0, 0, 0], &option(3, b"")[..]].concat(), 99).1, Step::Close);
    assert_eq!(run(&mut Handshake::new(), &[0, 0, 0, 7], 99).1, Step::Close);
}

/// Goal: contexts belong to one export and to the last request for them. Method: set, fail, set for
/// another export, and look at what GO brings.
#[test]
fn contexts_follow_their_export() {
    let both: [&[u8]; 2] = [b"base:allocation", b"qemu:allocation-depth"];
    let enter = |sets: &[Vec<u8>]| {
        let mut h = fixed();
        run(&mut h, &option(8, b""), 99);
        sets.iter().for_each(|s| assert_eq!(run(&mut h, &option(10, s), 9999).1, Step::More));
        match run(&mut h, &option(7, &go(b"d", &[])), 99).1 {
            Step::Enter(n) => n.contexts,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(enter(&[queries(b"d", &both)]), Contexts { base: true, depth: true });
    assert_eq!(enter(&[queries(b"d", &both), queries(b"d", &[])]), Contexts::default());
    assert_eq!(enter(&[queries(b"d", &both), queries(b"zz", &both)]), Contexts::default());
    assert_eq!(enter(&[queries(b"ro", &both)]), Contexts::default());
    assert_eq!(enter(&[queries(b"d", &[b"base:", b"qemu:", b"", b"foo:bar"])]), Contexts::default());
    assert_eq!(
        enter(&[queries(b"d", &[b"base:allocation".as_slice(); 50])]),
        Contexts { base: true, depth: false }
    );
}

/// Goal: listings know wildcards and an export's own contexts. Method: type sequences of the replies.
#[test]
fn listings() {
    let (ctx, ack) = (rep::META_CONTEXT, rep::ACK);
    type Case<'a> = (&'a [u8], &'a [&'a [u8]], &'a [u32]);
    let cases: &[Case] = &[
        (b"d", &[], &[ctx, ctx, ack]),
        (b"ro", &[], &[ctx, ack]),
        (b"d", &[b"qemu:"], &[ctx, ack]),
        (b"d", &[b"base:foo"], &[ack]),
        (b"d", &[b"", b"x", b"base:allocation", b"base:"], &[ctx, ack]),
        (b"zz", &[], &[rep::ERR_UNKNOWN]),
    ];
    for (name, q, want) in cases {
        let (out, ..) = run(&mut fixed(), &option(9, &queries(name, q)), 9999);
        assert_eq!(types(&out), *want);
    }
}

/// Goal: malformed options get an error and the handshake goes on. Method: each broken in one way, then LIST.
#[test]
fn malformed_options_are_refused() {
    let bad: &[(Vec<u8>, u32)] = &[
        (option(3, b"abc"), rep::ERR_INVALID),
        (option(4, b""), rep::ERR_UNSUP),
        (option(99, &[0; 300_000]), rep::ERR_UNSUP),
        (option(6, &[0; 300_000]), rep::ERR_TOO_BIG),
        (option(5, b""), rep::ERR_POLICY),
        (option(5, b"x"), rep::ERR_INVALID),
        (option(6, b"abc"), rep::ERR_INVALID),
        (option(6, &named(b"d")), rep::ERR_INVALID),
        (option(6, &[0, 0, 1, 244, b'd']), rep::ERR_INVALID),
        (option(6, &[0xff; 8]), rep::ERR_INVALID),
        (option(6, &[&go(b"d", &[])[..], b"zz"].concat()), rep::ERR_INVALID),
        (option(6, &[&named(b"d")[..], &[0, 3, 0, 0]].concat()), rep::ERR_INVALID),
        (option(7, &go(&[b'a'; 4097], &[])), rep::ERR_INVALID),
        (option(7, &go(&[0xff; 4096], &[])), rep::ERR_UNKNOWN),
        (option(8, b"x"), rep::ERR_INVALID),
        (option(10, &queries(b"d", &[b"base:allocation"])), rep::ERR_INVALID),
        (option(9, &[&queries(b"d", &[b"x"])[..], b"zz"].concat()), rep::ERR_INVALID),
        (option(9, &[&named(b"d")[..], &[0xff; 4], &named(b"x")].concat()), rep::ERR_INVALID),
        (option(9, &queries(b"d", &[&[b'a'; 4097]])), rep::ERR_INVALID),
    ];
    for (ask, want) in bad {
        let mut h = fixed();
        let (out, step, used) = run(&mut h, ask, 4096);
        assert_eq!((types(&out), step, used), (vec![*want], Step::More, ask.len()), "{:?}", &ask[8..20]);
        assert_eq!(types(&run(&mut h, &option(3, b""), 99).0), [rep::SERVER, rep::SERVER, rep::ACK]);
    }
}

/// Goal: structured replies and extended headers in every order, as the protocol has it.
/// Method: reply types, and the flags GO shows.
#[test]
fn framings() {
    let mut h = fixed();
    let (out, ..) = run(&mut h, &[11, 11, 8].map(|n| option(n, b"")).concat(), 999);
    assert_eq!(types(&out), [rep::ACK, rep::ERR_INVALID, rep::ERR_EXT_HEADER_REQD]);
    run(&mut h, &option(10, &queries(b"d", &[b"base:allocation"])), 999);
    let Step::Enter(n) = run(&mut h, &option(7, &go(b"d", &[])), 999).1 else { panic!() };
    assert_eq!((n.flags, n.framing), (0x1ded, Framing::Extended));
    let mut h = fixed();
    run(&mut h, &[8, 11].map(|n| option(n, b"")).concat(), 999);
    assert_eq!(run(&mut h, &option(1, b"d"), 999), (vec![], Step::Close, 17));
}

/// Goal: a handshake cannot go on for ever. Method: many small options, many drained bytes, a bad magic.
#[test]
fn handshakes_are_bounded() {
    let mut h = fixed();
    let n = (0..1000).take_while(|_| run(&mut h, &option(99, b""), 99).1 == Step::More).count();
    assert_eq!(n, OPTION_LIMIT + 8);
    let mut h = fixed();
    let data = vec![0; 20 << 20];
    assert_eq!(run(&mut h, &option(99, &data), INPUT_LIMIT).1, Step::More);
    assert_eq!(run(&mut h, &option(99, &data), INPUT_LIMIT).1, Step::Close);
    let huge = [b"IHAVEOPT".as_slice(), &[0, 0, 0, 99, 0xff, 0xff, 0xff, 0xff]].concat();
    assert_eq!(run(&mut fixed(), &huge, 99).1, Step::Close);
    assert_eq!(run(&mut fixed(), b"GET / HTTP/1.1\r\n", 99).1, Step::Close);
    assert_eq!(run(&mut fixed(), &option(2, b"abc"), 99).1, Step::Close);
}

/// Goal: no input panics, uses more than it is given, or makes the state machine stand still.
/// Method: seeded mutations of valid handshakes.
#[test]
fn mutated_handshakes() {
    let base = [
        vec![0, 0, 0, 3],
        option(8, b""),
        option(3, b""),
        option(10, &queries(b"d", &[b"base:allocation", b"qemu:allocation-depth"])),
        option(6, &go(b"ro", &[0, 1, 2, 3])),
        option(7, &go(b"d", &[3])),
    ]
    .concat();
    let mut seed = 1u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as usize
    };
    for _ in 0..20_000 {
        let mut b = base.clone();
        for _ in 0..1 + random() % 4 {
            let at = random() % b.len();
            b[at] = [0, 1, 0xff, 0x7f, random() as u8][random() % 5];
        }
        b.truncate(random() % (b.len() * 2));
        let (out, _, used) = run(&mut Handshake::new(), &b, 1 + random() % 300);
        assert!(used <= b.len() && out.len() < 1 << 16);
    }
}
