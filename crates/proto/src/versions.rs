//! Chooses the protocol version that two releases speak with each other.
//!
//! Every release speaks its own version and that of the release before it. So in a rolling upgrade neighbours always have one
//! in common, whichever side is renewed first; those that are further apart are refused, and go on asking slowly.

use std::fmt;

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    pub min: u32,
    pub max: u32,
}

impl Versions {
    /// The highest that both speak.
    pub fn highest_common(self, other: Self) -> Option<u32> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }

    /// Whether it is one of these.
    pub fn contains(self, version: u32) -> bool {
        (self.min..=self.max).contains(&version)
    }
}

/// For people: `2`, `1 to 2`.
impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.min, self.max) {
            (min, max) if min == max => write!(f, "{max}"),
            (min, max) => write!(f, "{min} to {max}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common(one: (u32, u32), other: (u32, u32)) -> Option<u32> {
        let versions = |(min, max)| Versions { min, max };
        let found = versions(one).highest_common(versions(other));
        assert_eq!(found, versions(other).highest_common(versions(one)), "both sides choose the same");
        found
    }

    #[test]
    fn the_highest_that_both_speak_is_chosen() {
        assert_eq!(common((1, 2), (1, 2)), Some(2));
        assert_eq!(common((1, 2), (2, 3)), Some(2), "a release apart");
        assert_eq!(common((1, 3), (1, 2)), Some(2));
        assert_eq!(common((1, 2), (3, 4)), None, "two releases apart");
        assert_eq!(common((1, 2), (4, 3)), None, "no range at all");
    }
}
