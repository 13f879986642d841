//! Inflate (RFC 1951), for compressed clusters: plain and short rather than fast.

/// Lengths 3..258 of symbols 257..285: base and extra bits (RFC 1951, 3.2.5).
const LENGTHS: [(u16, u8); 29] = [
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 1),
    (13, 1),
    (15, 1),
    (17, 1),
    (19, 2),
    (23, 2),
    (27, 2),
    (31, 2),
    (35, 3),
    (43, 3),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 4),
    (115, 4),
    (131, 5),
    (163, 5),
    (195, 5),
    (227, 5),
    (258, 0),
];

/// The order in which lengths of the code-length code are stored (RFC 1951, 3.2.7).
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

const MAX_BITS: usize = 15;

/// A canonical Huffman code: how many codes there are of each length, and the symbols in order.
#[derive(Debug)]
struct Code {
    counts: [u16; MAX_BITS + 1],
    symbols: [u16; 288],
}

impl Default for Code {
    fn default() -> Self {
        Self { counts: [0; MAX_BITS + 1], symbols: [0; 288] }
    }
}

impl Code {
    /// Builds the code of `lengths`; `None` if it promises more codes than there are.
    fn build(&mut self, lengths: &[u8]) -> Option<()> {
        self.counts = [0; MAX_BITS + 1];
        for &len in lengths {
            self.counts[usize::from(len)] += 1;
        }
        self.counts[0] = 0;
        let mut left = 1i32;
        let mut starts = [0u16; MAX_BITS + 2];
        for len in 1..=MAX_BITS {
            left = (left << 1) - i32::from(self.counts[len]);
            if left < 0 {
                return None;
            }
            starts[len + 1] = starts[len] + self.counts[len];
        }
        for (symbol, &len) in lengths.iter().enumerate().filter(|(_, len)| **len != 0) {
            let place = &mut starts[usize::from(len)];
            self.symbols[usize::from(*place)] = symbol as u16;
            *place += 1;
        }
        Some(())
    }
}

/// Bits of a byte string, least significant first.
struct Bits<'a> {
    from: &'a [u8],
    at: usize,
    held: u32,
    count: u32,
}

impl Bits<'_> {
    fn take(&mut self, wanted: u32) -> Option<u32> {
        while self.count < wanted {
            self.held |= u32::from(*self.from.get(self.at)?) << self.count;
            self.at += 1;
            self.count += 8;
        }
        let value = self.held & ((1u32 << wanted) - 1);
        self.held >>= wanted;
        self.count -= wanted;
        Some(value)
    }

    /// The next symbol of `code`: codes are read bit by bit, those of a length being consecutive numbers.
    fn symbol(&mut self, code: &Code) -> Option<usize> {
        let (mut value, mut first, mut index) = (0i32, 0i32, 0i32);
        for len in 1..=MAX_BITS {
            value |= self.take(1)? as i32;
            let count = i32::from(code.counts[len]);
            if value - count < first {
                return code.symbols.get((index + value - first) as usize).map(|s| usize::from(*s));
            }
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        None
    }
}

/// Memory for one cluster at a time.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    out: Vec<u8>,
    literals: Code,
    distances: Code,
}

impl Scratch {
    /// Unpacks `len` bytes; `None` if `from` does not hold so many.
    pub(crate) fn inflate(&mut self, from: &[u8], len: usize) -> Option<&[u8]> {
        self.out.clear();
        let mut bits = Bits { from, at: 0, held: 0, count: 0 };
        loop {
            let last = bits.take(1)? == 1;
            match bits.take(2)? {
                0 => self.stored(&mut bits)?,
                1 => {
                    self.fixed()?;
                    self.block(&mut bits, len)?;
                }
                2 => {
                    self.dynamic(&mut bits)?;
                    self.block(&mut bits, len)?;
                }
                _ => return None,
            }
            if self.out.len() >= len {
                return Some(&self.out[..len]);
            }
            if last {
                return None;
            }
        }
    }

    fn stored(&mut self, bits: &mut Bits<'_>) -> Option<()> {
        bits.take(bits.count % 8)?;
        let len = bits.take(16)?;
        let check = bits.take(16)?;
        if len ^ check != 0xffff {
            return None;
        }
        for _ in 0..len {
            let byte = bits.take(8)?;
            self.out.push(byte as u8);
        }
        Some(())
    }

    fn fixed(&mut self) -> Option<()> {
        let mut lengths = [8u8; 288];
        lengths[144..256].fill(9);
        lengths[256..280].fill(7);
        self.literals.build(&lengths)?;
        self.distances.build(&[5; 30])
    }

    fn dynamic(&mut self, bits: &mut Bits<'_>) -> Option<()> {
        let literals = bits.take(5)? as usize + 257;
        let distances = bits.take(5)? as usize + 1;
        let codes = bits.take(4)? as usize + 4;
        if literals > 286 || distances > 30 {
            return None;
        }
        let mut lengths = [0u8; 320];
        for &place in &ORDER[..codes] {
            lengths[place] = bits.take(3)? as u8;
        }
        self.literals.build(&lengths[..19])?;
        lengths.fill(0);
        let mut at = 0;
        while at < literals + distances {
            let symbol = bits.symbol(&self.literals)?;
            let (value, times) = match symbol {
                0..=15 => (symbol as u8, 1),
                16 => (*lengths.get(at.checked_sub(1)?)?, 3 + bits.take(2)? as usize),
                17 => (0, 3 + bits.take(3)? as usize),
                _ => (0, 11 + bits.take(7)? as usize),
            };
            if at + times > literals + distances {
                return None;
            }
            lengths[at..at + times].fill(value);
            at += times;
        }
        self.literals.build(&lengths[..literals])?;
        self.distances.build(&lengths[literals..literals + distances])
    }

    /// Literals and copies up to the end of the block, or until there is enough.
    fn block(&mut self, bits: &mut Bits<'_>, enough: usize) -> Option<()> {
        while self.out.len() < enough {
            let symbol = bits.symbol(&self.literals)?;
            if symbol < 256 {
                self.out.push(symbol as u8);
                continue;
            }
            if symbol == 256 {
                return Some(());
            }
            let (base, extra) = *LENGTHS.get(symbol - 257)?;
            let len = usize::from(base) + bits.take(extra.into())? as usize;
            let code = bits.symbol(&self.distances)? as u32;
            let extra = (code / 2).saturating_sub(1);
            let base = if code < 4 { code + 1 } else { ((2 + code % 2) << extra) + 1 };
            let distance = (base + bits.take(extra)?) as usize;
            let start = self.out.len().checked_sub(distance)?;
            for i in 0..len {
                self.out.push(self.out[start + i]);
            }
        }
        Some(())
    }
}
