//! Decides which branches and tags matter, by patterns.

use serde::{Deserialize, Serialize};

/// Patterns over short ref names (`main`, `release/1.x`). `*` stands for anything but a slash, `**` for anything, `?` for
/// one character that is no slash. A pattern that begins with `!` takes names out. The last pattern that fits decides;
/// without any pattern, or with only such that take out, the rest fits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NameFilter(Vec<String>);

/// Bounds that keep matching cheap, whatever is configured.
pub const MAX_PATTERNS: usize = 100;
pub const MAX_PATTERN_BYTES: usize = 256;

impl NameFilter {
    /// Takes the patterns, or says which is wrong (by its index) and why.
    pub fn new(patterns: Vec<String>) -> Result<Self, (usize, &'static str)> {
        for (index, pattern) in patterns.iter().enumerate() {
            let bare = pattern.strip_prefix('!').unwrap_or(pattern);
            let why = if index >= MAX_PATTERNS {
                "there are more than 100 patterns"
            } else if bare.is_empty() {
                "a pattern cannot be empty"
            } else if pattern.len() > MAX_PATTERN_BYTES {
                "a pattern cannot be longer than 256 bytes"
            } else if pattern.chars().any(|c| c.is_control() || c == ' ') {
                "no branch or tag has blanks or control characters in its name"
            } else if bare.starts_with("refs/") {
                "write the short name: `main`, not `refs/heads/main`"
            } else {
                continue;
            };
            return Err((index, why));
        }
        Ok(Self(patterns))
    }

    pub fn patterns(&self) -> &[String] {
        &self.0
    }

    pub fn fits(&self, name: &str) -> bool {
        let verdict = self.0.iter().rev().find_map(|pattern| match pattern.strip_prefix('!') {
            Some(pattern) => matches(pattern, name).then_some(false),
            None => matches(pattern, name).then_some(true),
        });
        verdict.unwrap_or_else(|| self.0.iter().all(|pattern| pattern.starts_with('!')))
    }
}

/// Matches in time proportional to the pattern's length times the name's: `reached[i]` tells whether the pattern read so
/// far can have consumed exactly the first `i` characters.
fn matches(pattern: &str, name: &str) -> bool {
    let name: Vec<char> = name.chars().collect();
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("**") {
            rest = after.trim_start_matches('*');
            let first = reached.iter().position(|reached| *reached).unwrap_or(reached.len());
            reached[first..].fill(true);
            continue;
        }
        rest = &rest[c.len_utf8()..];
        if c == '*' {
            for i in 0..name.len() {
                reached[i + 1] |= reached[i] && name[i] != '/';
            }
            continue;
        }
        for i in (0..name.len()).rev() {
            reached[i + 1] = reached[i] && (name[i] == c || (c == '?' && name[i] != '/'));
        }
        reached[0] = false;
    }
    reached[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(patterns: &[&str], name: &str) -> bool {
        NameFilter::new(patterns.iter().map(|pattern| (*pattern).to_owned()).collect()).unwrap().fits(name)
    }

    #[test]
    fn stars_stop_at_slashes_and_double_stars_do_not() {
        for (pattern, name, expected) in [
            ("main", "main", true),
            ("main", "main2", false),
            ("*", "main", true),
            ("*", "a/b", false),
            ("**", "a/b/c", true),
            ("release/*", "release/1", true),
            ("release/*", "release/1/x", false),
            ("release/**", "release/1/x", true),
            ("release/**", "release", false),
            ("v?.?", "v1.2", true),
            ("v?.?", "v1./", false),
            ("*-rc*", "v1-rc2", true),
            ("a**z", "a/b/z", true),
            ("**/x", "a/b/x", true),
            ("é*", "één", true),
            ("[ab]", "a", false),
        ] {
            assert_eq!(fits(&[pattern], name), expected, "{pattern} on {name}");
        }
    }

    #[test]
    fn the_last_pattern_that_fits_decides() {
        assert!(fits(&[], "anything/at/all"));
        assert!(fits(&["!wip/**"], "main"));
        assert!(!fits(&["!wip/**"], "wip/x"));
        assert!(!fits(&["main", "!wip/**"], "other"));
        assert!(!fits(&["**", "!wip/**"], "wip/x"));
        assert!(fits(&["**", "!wip/**", "wip/keep"], "wip/keep"));
    }

    #[test]
    fn a_pattern_made_to_be_slow_is_not() {
        let pattern = "*a".repeat(128);
        let started = std::time::Instant::now();
        assert!(!fits(&[&pattern], &"a".repeat(1000).replace("aa", "ab")));
        assert!(started.elapsed().as_secs() < 2);
    }

    #[test]
    fn patterns_that_cannot_fit_anything_are_refused() {
        for bad in ["", "!", "a b", "a\n", "refs/heads/main", &"x".repeat(257)] {
            assert!(NameFilter::new(vec![bad.to_owned()]).is_err(), "{bad:?}");
        }
    }
}
