//! How results are printed: amounts, rates, times and dumps.

use crate::tool::out;
use std::time::Duration;

/// An amount of bytes: "512 bytes", "64 KiB", "1.500 MiB".
pub(super) fn amount(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    for (i, unit) in UNITS.iter().enumerate() {
        let one = (1u64 << (60 - 10 * i)) as f64;
        if bytes >= one {
            return format!("{} {unit}", trim(format!("{:.3}", bytes / one)));
        }
    }
    format!("{} bytes", trim(format!("{bytes:.6}")))
}

/// Drops a fraction of nothing but zeroes.
fn trim(number: String) -> String {
    match number.split_once('.') {
        Some((whole, fraction)) if fraction.bytes().all(|b| b == b'0') => whole.to_owned(),
        _ => number,
    }
}

/// How long something took: "00.02 sec", "01:02.03", "1:02:03.04"; the last form always if `fixed`.
fn duration(d: Duration, fixed: bool) -> String {
    let (s, hundredths) = (d.as_secs(), d.subsec_millis() / 10);
    let (h, m, s) = (s / 3600, s / 60 % 60, s % 60);
    if fixed || h > 0 {
        format!("{h}:{m:02}:{s:02}.{hundredths:02}")
    } else if m > 0 {
        format!("{m:02}:{s:02}.{hundredths:02}")
    } else {
        format!("{s:02}.{hundredths:02} sec")
    }
}

/// One request that has been done.
pub(super) struct Done {
    /// "wrote", "read", "discard".
    pub(super) verb: &'static str,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) took: Duration,
    /// `-C`.
    pub(super) machine: bool,
}

/// Prints the result of a request.
pub(super) fn request(d: &Done) {
    let seconds = d.took.as_secs_f64().max(1e-9);
    let (rate, ops) = (d.bytes as f64 / seconds, 1.0 / seconds);
    if d.machine {
        out(&format!("{},1,{},{rate:.3},{ops:.3}\n", d.bytes, duration(d.took, true)));
        return;
    }
    let (verb, n) = (d.verb, d.bytes);
    out(&format!(
        "{verb} {n}/{n} bytes at offset {}\n{}, 1 ops; {} ({}/sec and {ops:.4} ops/sec)\n",
        d.offset,
        amount(n as f64),
        duration(d.took, false),
        amount(rate),
    ));
}

/// Sixteen bytes a line, as numbers and as letters and digits.
pub(super) fn dump(data: &[u8], offset: u64) -> String {
    let mut text = String::new();
    for (i, line) in data.chunks(16).enumerate() {
        text += &format!("{:08x}:  ", offset + 16 * i as u64);
        for b in line {
            text += &format!("{b:02x} ");
        }
        text.push(' ');
        text.extend(line.iter().map(|b| if b.is_ascii_alphanumeric() { *b as char } else { '.' }));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: texts of the peer. Method: recorded from it.
    #[test]
    fn texts() {
        for (n, want) in [
            (0.0, "0 bytes"),
            (512.0, "512 bytes"),
            (17.870523, "17.870523 bytes"),
            (65536.0, "64 KiB"),
            (0x9f0000 as f64, "9.938 MiB"),
            (30288118.0, "28.885 MiB"),
        ] {
            assert_eq!(amount(n), want);
        }
        for (ms, fixed, want) in [
            (20, false, "00.02 sec"),
            (20, true, "0:00:00.02"),
            (62_030, false, "01:02.03"),
            (3_723_040, false, "1:02:03.04"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms), fixed), want);
        }
        assert_eq!(dump(b"ab\x00", 16), "00000010:  61 62 00  ab.\n");
    }
}
