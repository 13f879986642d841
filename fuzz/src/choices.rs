//! Bytes as a row of choices: what structure-aware targets build their inputs from.
//!
//! Invariants: every row of bytes is a valid row of choices, and one that is over goes on with zeroes, so that the
//! simplest choice is always number 0.

/// A row of choices.
#[derive(Clone, Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// From the beginning.
    pub fn new(bytes: &'a [u8]) -> Choices<'a> {
        Choices(bytes)
    }

    /// Whether the bytes are used up.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    /// A number of this many bytes, the first the highest.
    pub fn number(&mut self, bytes: u32) -> u64 {
        (0..bytes).fold(0, |n, _| n << 8 | u64::from(self.byte()))
    }

    /// A number below `n` (0 if that is 0).
    pub fn below(&mut self, n: u64) -> u64 {
        let bytes = if n <= 256 { 1 } else { 2 };
        self.number(bytes).checked_rem(n).unwrap_or(0)
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// One time in `n`, and never when the bytes are over.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }

    /// The next bytes, at most this many.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A value for a field that holds `was`: a number at the edge of something, or a small change.
    pub fn broken(&mut self, was: u64, width: u32) -> u64 {
        let all = if width >= 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
        let value = match self.byte() % 12 {
            0 => was.wrapping_add(1),
            1 => was.wrapping_sub(1),
            2 => 0,
            3 => all,
            4 => was ^ 1 << (self.byte() % 64),
            5 => was << 1,
            6 => was >> 1,
            7 => 1 << (self.byte() % 64),
            8 => (1 << (self.byte() % 64)) - 1,
            9 => was.wrapping_add(512),
            10 => was.wrapping_sub(512),
            _ => self.number(width.min(8)),
        };
        value & all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: any bytes will do. Method: few bytes, many choices.
    #[test]
    fn endless() {
        let mut c = Choices::new(&[5, 1, 2]);
        assert_eq!((c.below(3), c.number(2), c.is_over()), (2, 0x102, true));
        assert_eq!((c.below(0), c.byte(), c.one_in(4), c.pick(&[7, 8])), (0, 0, false, 7));
        assert_eq!(c.bytes(4), b"");
        assert_eq!(Choices::new(&[1]).broken(0, 4), 0xffff_ffff);
    }
}
