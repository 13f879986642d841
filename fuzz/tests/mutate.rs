//! Goal: the fuzz targets hold on stable, in the ordinary test run. Method: seeds of every kind, mutated by a small
//! seeded generator (bit flips, interesting numbers, cuts, copies, splices), some tens of thousands of times a target.
//! A failure prints the seed and the iteration; the input is reproduced by running with the same numbers.

use std::panic::{AssertUnwindSafe, catch_unwind};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

const NUMBERS: [u64; 10] = [0, 1, 7, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 56, u64::MAX];

fn mutate(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[rng.below(seeds.len())].clone();
    for _ in 0..=rng.below(6) {
        let at = rng.below(data.len());
        match rng.below(7) {
            0 if !data.is_empty() => data[at] ^= 1 << rng.below(8),
            1 if !data.is_empty() => data[at] = rng.next() as u8,
            2 => {
                let number = NUMBERS[rng.below(NUMBERS.len())].to_be_bytes();
                let width = [1, 2, 4, 8][rng.below(4)];
                for (d, s) in data.iter_mut().skip(at).zip(&number[8 - width..]) {
                    *d = *s;
                }
            }
            3 => data.truncate(at),
            4 => {
                let end = (at + 1 + rng.below(64)).min(data.len());
                let piece = data.get(at..end).unwrap_or_default().to_vec();
                data.splice(at..at, piece);
            }
            5 => {
                let other = &seeds[rng.below(seeds.len())];
                let from = rng.below(other.len());
                data.splice(at.., other.iter().skip(from).copied());
            }
            _ => data.insert(at, b"{}[]\"',:=.\\\0\n0a"[rng.below(15)]),
        }
        data.truncate(1 << 16);
    }
    data
}

fn run(name: &str, target: fn(&[u8]), seeds: &[Vec<u8>]) {
    let times: u64 = std::env::var("RINGBLOCK_FUZZ_RUNS").ok().and_then(|v| v.parse().ok()).unwrap_or(40_000);
    let seed: u64 =
        std::env::var("RINGBLOCK_FUZZ_SEED").ok().and_then(|v| v.parse().ok()).unwrap_or(0x1234_5678);
    let mut rng = Rng(seed | 1);
    for s in seeds {
        target(s);
    }
    for i in 0..times {
        let data = mutate(&mut rng, seeds);
        if catch_unwind(AssertUnwindSafe(|| target(&data))).is_err() {
            panic!("{name}: seed {seed:#x}, iteration {i}, input {:02x?}", &data[..data.len().min(512)]);
        }
    }
}

/// A version 3 header with a name, an extension and its end mark.
fn header() -> Vec<u8> {
    let mut h = vec![0u8; 65_536];
    let mut put = |at: usize, bytes: &[u8]| h[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 30).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &0x30000u64.to_be_bytes());
    put(48, &0x10000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(112, &0xe279_2acau32.to_be_bytes());
    put(116, &3u32.to_be_bytes());
    put(120, b"raw");
    h
}

#[test]
fn qcow2_header() {
    let v3 = header();
    assert!(
        ringblock_drivers::format::qcow2::header::Header::parse(&v3).is_ok(),
        "the seed is a valid header"
    );
    let mut v2 = v3.clone();
    v2[7] = 2;
    v2[72..].fill(0);
    run("qcow2_header", ringblock_fuzz::qcow2_header, &[v3[..1024].to_vec(), v3, v2]);
}

#[test]
fn snapshot_table() {
    let mut entry = vec![1u8];
    entry.extend(0x50000u64.to_be_bytes());
    entry.extend(2u32.to_be_bytes());
    entry.extend([0, 1, 0, 4]);
    entry.extend([0u8; 16]);
    entry.extend(0u32.to_be_bytes());
    entry.extend(16u32.to_be_bytes());
    entry.extend([0u8; 16]);
    entry.extend(b"1snap\0\0\0");
    run("snapshot_table", ringblock_fuzz::snapshot_table, &[entry, vec![0], vec![255; 300]]);
}

#[test]
fn nbd_handshake() {
    let option = |kind: u32, data: &[u8]| {
        let mut o = b"IHAVEOPT".to_vec();
        o.extend(kind.to_be_bytes());
        o.extend((data.len() as u32).to_be_bytes());
        o.extend(data);
        o
    };
    let go = [&1u32.to_be_bytes()[..], b"d", &0u16.to_be_bytes()].concat();
    let meta = [&1u32.to_be_bytes()[..], b"d", &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"]
        .concat();
    let flags = 3u32.to_be_bytes().to_vec();
    let talk = [flags.clone(), option(3, b""), option(8, b""), option(10, &meta), option(7, &go)].concat();
    let short = [flags.clone(), option(1, b"d")].concat();
    run("nbd_handshake", ringblock_fuzz::nbd_handshake, &[talk, short, flags]);
}

#[test]
fn json() {
    let seeds: [&[u8]; 4] = [
        b"{\"execute\": \"blockdev-add\", \"arguments\": {\"driver\": \"null-co\", \"size\": 1048576}, \"id\": [1, -2.5e3, null]}",
        b"{'a': 'single \\u20ac quoted', \"b\": [true, false, {}]}\n{}",
        b"garbage } ] \x03 {\"x\": 18446744073709551615}",
        b"[[[[[[[[\"\\ud83d\\ude00\"]]]]]]]]",
    ];
    run("json", ringblock_fuzz::json, &seeds.map(<[u8]>::to_vec));
}

#[test]
fn options() {
    let seeds: [&[u8]; 4] = [
        b"driver=qcow2,node-name=d,file.driver=file,file.filename=a,,b,cache.direct=on,l2-cache-size=4M",
        b"{\"driver\": \"raw\", \"offset\": 512, \"file\": {\"driver\": \"file\", \"filename\": \"x\"}}",
        b"null-co,size=1G,latency-ns=5,read-zeroes=on",
        b"raw,file=node0,size=1.5k",
    ];
    run("options", ringblock_fuzz::options, &seeds.map(<[u8]>::to_vec));
}
