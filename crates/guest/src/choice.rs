//! Chooses files by paths and globs.
//!
//! `*`, `?`, `[ab]` and `{a,b}` stand within one name (braces may hold more), `**` for any number of folders; a folder is
//! chosen with all that is in it; what begins with `!` leaves out what the others choose.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::places::Places;

/// What stands for more than itself in a pattern.
const SPECIAL: &[u8] = b"*?[]{}\\";

/// Some patterns, understood.
pub struct Choice {
    chosen: Vec<Pattern>,
    left_out: Vec<Pattern>,
}

struct Pattern {
    /// Its place in the list it came from.
    place: u32,
    /// What the glob is relative to.
    root: PathBuf,
    glob: Vec<u8>,
    /// The longest path in front of everything special.
    start: PathBuf,
    /// How many names deep it reaches below the root; none: without end.
    depth: Option<usize>,
    has_chosen: bool,
}

impl Choice {
    /// Reads the patterns; the error is for a person.
    pub fn read(patterns: &[String], places: &Places) -> Result<Self, String> {
        let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
        for (place, text) in (0..).zip(patterns) {
            match text.strip_prefix('!') {
                Some(rest) => left_out.push(Pattern::read(place, rest, places)?),
                None => chosen.push(Pattern::read(place, text, places)?),
            }
        }
        Ok(Self { chosen, left_out })
    }

    /// Where to look, each place once and none in another.
    pub fn starts(&self) -> Vec<PathBuf> {
        let mut starts: Vec<_> = self.chosen.iter().map(|pattern| pattern.start.clone()).collect();
        // By their components, so whatever is below a path comes after it.
        starts.sort_unstable();
        starts.dedup_by(|later, earlier| later.starts_with(&*earlier));
        starts
    }

    /// Whether a path is chosen by itself.
    pub fn chooses(&mut self, path: &Path) -> bool {
        let mut chooses = false;
        for pattern in &mut self.chosen {
            // All of them, for the sake of `missing`; one that has chosen need not be asked for a second reason.
            if (!chooses || !pattern.has_chosen) && pattern.matches(path) {
                pattern.has_chosen = true;
                chooses = true;
            }
        }
        chooses
    }

    /// Whether a path is left out, and all that is below it.
    pub fn leaves_out(&self, path: &Path) -> bool {
        self.left_out.iter().any(|pattern| pattern.matches(path))
    }

    /// Whether something below a folder may be chosen by itself.
    pub fn reaches_into(&self, folder: &Path) -> bool {
        self.chosen.iter().any(|pattern| pattern.reaches_into(folder))
    }

    /// Whether anything is still unchosen that a path in a chosen folder may be the first of.
    pub fn is_satisfied(&self) -> bool {
        self.chosen.iter().all(|pattern| pattern.has_chosen)
    }

    /// The places of the patterns that have chosen nothing.
    pub fn missing(&self) -> Vec<u32> {
        self.chosen.iter().filter(|pattern| !pattern.has_chosen).map(|pattern| pattern.place).collect()
    }
}

impl Pattern {
    fn read(place: u32, text: &str, places: &Places) -> Result<Self, String> {
        let (root, rest) = places.split(text.as_bytes());
        let mut names: Vec<&[u8]> = Vec::new();
        for name in rest.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." => return Err(format!("`{text}` has a `..`, which leads out of where it starts")),
                name => names.push(name),
            }
        }
        let glob = names.join(&b'/');
        fast_glob::validate(&glob).map_err(|error| format!("`{text}` is no pattern: {error}"))?;
        let is_plain = |name: &&&[u8]| !name.iter().any(|byte| SPECIAL.contains(byte));
        let plain = names.iter().take_while(is_plain);
        let start = plain.fold(root.to_owned(), |path, name| path.join(std::ffi::OsStr::from_bytes(name)));
        // Braces may hold slashes, and so stand for paths of several lengths.
        let is_endless = glob.contains(&b'{') || names.contains(&&b"**"[..]);
        Ok(Self {
            place,
            root: root.to_owned(),
            start,
            depth: (!is_endless).then_some(names.len()),
            glob,
            has_chosen: false,
        })
    }

    fn matches(&self, path: &Path) -> bool {
        let Ok(rest) = path.strip_prefix(&self.root) else { return false };
        let rest = rest.as_os_str().as_bytes();
        if self.glob.is_empty() || rest.is_empty() {
            return self.glob == rest;
        }
        fast_glob::glob_match(&self.glob, rest)
    }

    fn reaches_into(&self, folder: &Path) -> bool {
        if self.start.starts_with(folder) {
            return self.start != folder || self.depth != Some(self.names_to(folder));
        }
        folder.starts_with(&self.start) && self.depth.is_none_or(|depth| self.names_to(folder) < depth)
    }

    /// How many names a path has below the root.
    fn names_to(&self, path: &Path) -> usize {
        let below = path.strip_prefix(&self.root).unwrap_or(Path::new(""));
        below.components().filter(|component| matches!(component, Component::Normal(_))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(patterns: &[&str]) -> Choice {
        let places = Places { workdir: "/w".into(), home: "/h".into() };
        let patterns: Vec<_> = patterns.iter().map(|text| (*text).to_owned()).collect();
        Choice::read(&patterns, &places).unwrap()
    }

    #[test]
    fn patterns_choose_what_they_say() {
        for (pattern, chosen, not) in [
            ("a.txt", "/w/a.txt", "/w/b/a.txt"),
            ("./a//b/", "/w/a/b", "/w/a"),
            ("*.xml", "/w/.x.xml", "/w/d/a.xml"),
            ("**/x", "/w/d/e/x", "/w/d/e/xy"),
            ("**/x", "/w/x", "/x"),
            ("target/*/out.{a,b}", "/w/target/z/out.b", "/w/target/out.b"),
            ("~/.cache", "/h/.cache", "/w/.cache"),
            ("/etc/h[oi]sts", "/etc/hosts", "/w/etc/hosts"),
            ("\\*", "/w/*", "/w/a"),
            (".", "/w", "/w/a"),
            ("~", "/h", "/w"),
        ] {
            assert!(choice(&[pattern]).chooses(Path::new(chosen)), "{pattern} chooses {chosen}");
            assert!(!choice(&[pattern]).chooses(Path::new(not)), "{pattern} does not choose {not}");
        }
    }

    #[test]
    fn a_search_goes_no_further_than_it_must() {
        let choice_of = choice(&["target/*.xml", "deep/a/b", "**/never"]);
        assert_eq!(choice_of.starts(), [Path::new("/w")]);
        let choice_of = choice(&["target/*.xml", "deep/a/b", "~/x", "/w/target/sub/y"]);
        assert_eq!(choice_of.starts(), ["/h/x", "/w/deep/a/b", "/w/target"].map(PathBuf::from));
        for (folder, reached) in [
            ("/w/target", true),
            ("/w/target/sub", true),
            ("/w/target/sub/y", false),
            ("/w/target/other", false),
            ("/w", true),
            ("/w/deep/a", true),
            ("/w/deep/a/b", false),
            ("/w/deep/c", false),
        ] {
            assert_eq!(choice_of.reaches_into(Path::new(folder)), reached, "{folder}");
        }
        assert!(choice(&["{a/b,c}"]).reaches_into(Path::new("/w/a")));
    }

    #[test]
    fn what_leaves_out_and_what_is_missing() {
        let mut choice = choice(&["target", "!target/**/*.o", "nowhere/*", "!*.tmp"]);
        assert!(choice.chooses(Path::new("/w/target")));
        assert!(choice.leaves_out(Path::new("/w/target/a/b.o")));
        assert!(!choice.leaves_out(Path::new("/w/target/a/b.c")));
        assert_eq!(choice.missing(), [2]);
        assert!(!choice.is_satisfied());
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        let places = Places { workdir: "/w".into(), home: "/h".into() };
        for pattern in ["../x", "a/../b", "a[", "{a"] {
            assert!(Choice::read(&[pattern.to_owned()], &places).is_err(), "{pattern}");
        }
    }
}
