//! What an execution was seen to do, as a set of features: the feedback that guides mutation without instrumentation.
//!
//! Invariant: numbers inside texts and exact sizes do not count, so that features say what kind of thing happened.

/// The features of one execution.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// A hash of each thing that happened.
    pub features: Vec<u64>,
}

impl Outcome {
    /// Something that has a text: an error, the name of a state. Digits and what stands in quotes are not looked at.
    pub fn text(&mut self, place: &str, text: &str) {
        let mut hash = start(place);
        let mut quoted = false;
        for byte in text.bytes().take(200) {
            match byte {
                b'\'' | b'"' => quoted = !quoted,
                b'0'..=b'9' => {}
                _ if quoted => {}
                _ => hash = step(hash, byte.into()),
            }
        }
        self.features.push(hash);
    }

    /// A number of few values, as it is.
    pub fn kind(&mut self, place: &str, value: u64) {
        self.features.push(step(start(place), value));
    }

    /// A number of many values, by its order of magnitude.
    pub fn size(&mut self, place: &str, value: u64) {
        self.features.push(step(start(place), u64::from(u64::BITS - value.leading_zeros())));
    }

    /// How something ended: well, or with an error of this text.
    pub fn result<T, E: std::fmt::Display>(&mut self, place: &str, result: &Result<T, E>) {
        match result {
            Ok(_) => self.kind(place, 0),
            Err(e) => self.text(place, &e.to_string()),
        }
    }
}

fn start(place: &str) -> u64 {
    place.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| step(h, b.into()))
}

fn step(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: features tell kinds apart and nothing else. Method: pairs.
    #[test]
    fn features() {
        let of = |f: &dyn Fn(&mut Outcome)| {
            let mut o = Outcome::default();
            f(&mut o);
            o.features
        };
        let text = |t: &'static str| of(&move |o| o.text("a", t));
        assert_eq!(text("bad size 12 of 'x'"), text("bad size 9 of 'yy'"));
        assert_ne!(text("bad size"), text("bad name"));
        assert_ne!(of(&|o| o.kind("a", 1)), of(&|o| o.kind("b", 1)));
        assert_eq!(of(&|o| o.size("a", 1000)), of(&|o| o.size("a", 1001)));
        assert_ne!(of(&|o| o.size("a", 1000)), of(&|o| o.size("a", 5000)));
    }
}
