//! New inputs from old ones: a small seeded mutator with a dictionary.
//!
//! Invariant: the same seed, inputs and words give the same mutants.

use ringblock_engine::host::sim::Rng;

/// Numbers at the edges of things.
const NUMBERS: [u64; 12] =
    [0, 1, 7, 0x7f, 0xff, 0x100, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 56, 1 << 63, u64::MAX];

/// The mutator of one target.
#[derive(Clone, Debug)]
pub struct Mutator {
    rng: Rng,
    words: &'static [&'static [u8]],
    longest: usize,
}

impl Mutator {
    /// A mutator that puts in these words and makes inputs of at most `longest` bytes.
    pub fn new(seed: u64, words: &'static [&'static [u8]], longest: usize) -> Mutator {
        Mutator { rng: Rng::new(seed), words, longest }
    }

    /// A mutant of one of the inputs, written into `data`.
    pub fn next(&mut self, inputs: &[Vec<u8>], data: &mut Vec<u8>) {
        data.clear();
        if inputs.is_empty() {
            return;
        }
        // the newest are the most promising
        let from = if self.rng.chance(300) { inputs.len().saturating_sub(8) } else { 0 };
        data.extend_from_slice(&inputs[from + self.rng.index(inputs.len() - from)]);
        let most = 1 << self.rng.below(4);
        let changes = 1 + self.rng.below(most);
        for _ in 0..changes {
            self.change(inputs, data);
        }
        data.truncate(self.longest);
    }

    fn change(&mut self, inputs: &[Vec<u8>], data: &mut Vec<u8>) {
        let at = self.rng.below(data.len() as u64 + 1) as usize;
        match self.rng.below(12) {
            0 => self.alter(data, at, |rng, b| b ^ 1 << rng.below(8)),
            1 => self.alter(data, at, |rng, _| rng.next() as u8),
            2 => self.alter(data, at, |rng, b| b.wrapping_add(rng.between(1, 16) as u8).wrapping_sub(8)),
            3 => {
                let width = self.rng.pick(&[1, 2, 4, 8]);
                let at = if self.rng.chance(500) { at - at % width } else { at };
                let number = self.rng.pick(&NUMBERS).to_be_bytes();
                overwrite(data, at, &number[8 - width..]);
            }
            4 => data.truncate(at),
            5 => {
                let end = (at + 1 + self.rng.index(64)).min(data.len());
                data.drain(at.min(end)..end);
            }
            6 => {
                let end = (at + 1 + self.rng.index(64)).min(data.len());
                let piece = data[at.min(end)..end].to_vec();
                let to = self.rng.below(data.len() as u64 + 1) as usize;
                data.splice(to..to, piece);
            }
            7 => {
                let other = &inputs[self.rng.index(inputs.len())];
                let from = self.rng.below(other.len() as u64 + 1) as usize;
                data.splice(at.., other[from..].iter().copied());
            }
            8 => {
                let other = &inputs[self.rng.index(inputs.len())];
                let from = self.rng.below(other.len() as u64 + 1) as usize;
                let n = self.rng.index(64).min(other.len() - from);
                data.splice(at..at, other[from..from + n].iter().copied());
            }
            9 if !self.words.is_empty() => overwrite(data, at, self.rng.pick(self.words)),
            10 | 9 if !self.words.is_empty() => {
                let word = self.rng.pick(self.words);
                data.splice(at..at, word.iter().copied());
            }
            _ => {
                let byte = self.rng.next() as u8;
                data.insert(at, byte);
            }
        }
    }

    fn alter(&mut self, data: &mut [u8], at: usize, change: impl Fn(&mut Rng, u8) -> u8) {
        if let Some(b) = data.get_mut(at) {
            *b = change(&mut self.rng, *b);
        }
    }
}

fn overwrite(data: &mut [u8], at: usize, with: &[u8]) {
    data.iter_mut().skip(at).zip(with).for_each(|(d, s)| *d = *s);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a seed is a row of mutants, within bounds, from any inputs. Method: two runs side by side.
    #[test]
    fn seeded() {
        let inputs = [b"abc".to_vec(), Vec::new(), vec![7; 100]];
        let (mut a, mut b) = (Mutator::new(3, &[b"word"], 64), Mutator::new(3, &[b"word"], 64));
        let (mut x, mut y) = (Vec::new(), Vec::new());
        let mut kinds = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            a.next(&inputs, &mut x);
            b.next(&inputs, &mut y);
            assert_eq!(x, y);
            assert!(x.len() <= 64);
            kinds.insert(x.clone());
        }
        assert!(kinds.len() > 500 && kinds.iter().any(|k| k.windows(4).any(|w| w == b"word")));
    }
}
