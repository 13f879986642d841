//! Offsets that cannot be mixed up: a place on the guest's disk is not a place in a file.
//!
//! Every quantity that a translation could confuse has a type of its own; only differences and lengths are plain
//! `u64`. All arithmetic that can leave the range of an image is checked by name; the operators panic on overflow
//! (release builds keep overflow checks) and are for values already known to be in range.
//!
//! ```text
//! GuestOffset ──format lookup──► HostOffset ──protocol──► file
//!      └── minus GuestOffset ──► u64 bytes
//! ```

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// Defines a byte-offset newtype over `u64`.
macro_rules! offset_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The start of the address space.
            pub const ZERO: $name = $name(0);

            /// The plain number of bytes.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + bytes`, or `None` past the end of 64 bits.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<$name> {
                match self.0.checked_add(bytes) {
                    Some(v) => Some($name(v)),
                    None => None,
                }
            }

            /// `self - bytes`, or `None` below zero.
            #[inline]
            pub const fn checked_sub(self, bytes: u64) -> Option<$name> {
                match self.0.checked_sub(bytes) {
                    Some(v) => Some($name(v)),
                    None => None,
                }
            }

            /// Whether this is a multiple of `align`, a power of two.
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }

            /// The largest multiple of `align`, a power of two, that is not above this.
            #[inline]
            pub const fn align_down(self, align: u64) -> $name {
                $name(self.0 & !(align - 1))
            }

            /// The smallest multiple of `align`, a power of two, that is not below this, or `None` past 64 bits.
            #[inline]
            pub const fn checked_align_up(self, align: u64) -> Option<$name> {
                match self.0.checked_add(align - 1) {
                    Some(v) => Some($name(v & !(align - 1))),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl Add<u64> for $name {
            type Output = $name;
            #[inline]
            fn add(self, bytes: u64) -> $name {
                $name(self.0 + bytes)
            }
        }

        impl AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, bytes: u64) {
                self.0 += bytes;
            }
        }

        impl Sub for $name {
            type Output = u64;
            #[inline]
            fn sub(self, earlier: $name) -> u64 {
                self.0 - earlier.0
            }
        }
    };
}

offset_type! {
    /// A byte offset on the virtual disk that a guest sees.
    GuestOffset
}
offset_type! {
    /// A byte offset in the file that stores an image.
    HostOffset
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: alignment arithmetic holds at both ends of the range. Method: boundary values.
    #[test]
    fn alignment_at_the_edges() {
        assert_eq!(GuestOffset(511).align_down(512), GuestOffset::ZERO);
        assert_eq!(GuestOffset(1).checked_align_up(512), Some(GuestOffset(512)));
        assert_eq!(GuestOffset(u64::MAX).checked_align_up(512), None);
        assert_eq!(HostOffset(u64::MAX).checked_add(1), None);
        assert_eq!(HostOffset(4096) - HostOffset(512), 3584);
        assert!(HostOffset(u64::MAX - 511).is_aligned(512));
    }
}
