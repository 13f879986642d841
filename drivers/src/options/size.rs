//! Sizes in bytes with the suffixes people type: `64k`, `1.5G`.
//!
//! Suffixes are powers of 1024 and are accepted only where the input is text; a JSON number is plain bytes.

use std::fmt;

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(pub u64);

impl fmt::Debug for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Why a text is not a size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadSize {
    /// Not a number with an optional suffix.
    Syntax,
    /// More than 64 bits hold.
    Range,
}

/// Parses a size: decimal or `0x` digits, or a decimal fraction, then one of `b k M G T P E` (any case).
///
/// `default_shift` is the power of two of the unit when there is no suffix (0: bytes).
/// A fraction of a byte is rounded down. `0x1b` is 27 and not one byte.
pub fn parse(text: &str, default_shift: u32) -> Result<u64, BadSize> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadSize::Syntax);
        }
        let n = u64::from_str_radix(hex, 16).map_err(|_| BadSize::Range)?;
        return n.checked_mul(1u64 << default_shift).ok_or(BadSize::Range);
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (whole, rest) = text.split_at(digits);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(after) => after.split_at(after.bytes().take_while(u8::is_ascii_digit).count()),
        None => ("", rest),
    };
    if whole.is_empty() || (rest.starts_with('.') && fraction.is_empty()) {
        return Err(BadSize::Syntax);
    }
    let shift = match suffix {
        "" => default_shift,
        _ => shift_of(suffix).ok_or(BadSize::Syntax)?,
    };
    if shift == 0 && fraction.bytes().any(|b| b != b'0') {
        return Err(BadSize::Syntax);
    }
    let unit = 1u64 << shift;
    let whole: u64 = whole.parse().map_err(|_| BadSize::Range)?;
    let base = whole.checked_mul(unit).ok_or(BadSize::Range)?;
    base.checked_add(fraction_of(fraction, unit)).ok_or(BadSize::Range)
}

/// `0.fraction * unit`, rounded down. Digits beyond the 18th cannot matter for a unit of at most 2^60.
fn fraction_of(fraction: &str, unit: u64) -> u64 {
    let digits = &fraction[..fraction.len().min(18)];
    if digits.is_empty() {
        return 0;
    }
    let num: u128 = digits.parse().unwrap_or(0);
    let den = 10u128.pow(digits.len() as u32);
    u64::try_from(num * u128::from(unit) / den).unwrap_or(u64::MAX)
}

fn shift_of(suffix: &str) -> Option<u32> {
    let mut chars = suffix.chars();
    let (first, None) = (chars.next()?, chars.next()) else {
        return None;
    };
    Some(match first.to_ascii_lowercase() {
        'b' => 0,
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        'p' => 50,
        'e' => 60,
        _ => return None,
    })
}

/// A size for people: `1 GiB`, `1.5 MiB`, `512 B`; three significant digits, as qemu-img prints them.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut at = 0;
    let mut v = bytes as f64;
    // 999.5 and not 1024: a fourth digit would not fit.
    while v >= 999.5 && at + 1 < UNITS.len() {
        v /= 1024.0;
        at += 1;
    }
    let digits = match v {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let mut s = format!("{v:.digits$}");
    if s.contains('.') {
        s.truncate(s.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{s} {}", UNITS[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what people type is understood, nonsense is not. Method: a table.
    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1.5K", 1536),
            ("10G", 10 << 30),
            ("0x10", 16),
            ("0.5M", 1 << 19),
            ("15E", 15 << 60),
            ("12b", 12),
            ("1.0", 1),
        ] {
            assert_eq!(parse(text, 0), Ok(want), "{text}");
        }
        for text in ["", "k", "1kk", "-1", "1.", "1.5", ".5k", "0x", "1 k", "x", "0x1g"] {
            assert_eq!(parse(text, 0), Err(BadSize::Syntax), "{text}");
        }
        for text in ["16E", "99999999999999999999", "15.99999999999999999999999E1"] {
            assert!(parse(text, 0).is_err(), "{text}");
        }
        assert_eq!(parse("3", 20), Ok(3 << 20));
    }

    /// Goal: three digits, right unit. Method: values around the edges.
    #[test]
    fn for_people() {
        for (n, want) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1 << 30, "1 GiB"),
            (1536 << 20, "1.5 GiB"),
            (196616, "192 KiB"),
        ] {
            assert_eq!(human(n), want);
        }
    }
}
