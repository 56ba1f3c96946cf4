//! Describes what happened in a repository, exactly: an event carries the full commit id it is about.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub kind: EventKind,
    /// The full ref name, `refs/heads/main`. An event by hand may have none.
    pub r#ref: Option<RefName>,
    pub revision: Revision,
}

impl Event {
    /// Names what a ref's new revision is: a tag for `refs/tags/`, a push otherwise (I4: the kind follows from the ref).
    pub fn kind_of_ref(r#ref: &RefName) -> EventKind {
        if r#ref.as_str().starts_with("refs/tags/") { EventKind::Tag } else { EventKind::Push }
    }
}

/// The kinds of events there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    Push,
    PullRequest,
    Tag,
    Schedule,
    Manual,
}

impl EventKind {
    const ALL: [Self; 5] = [Self::Push, Self::PullRequest, Self::Tag, Self::Schedule, Self::Manual];

    /// The name on every wire, in the database and in `SEALCI_EVENT`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Push => "push",
            Self::PullRequest => "pull_request",
            Self::Tag => "tag",
            Self::Schedule => "schedule",
            Self::Manual => "manual",
        }
    }

    /// Reads [`EventKind::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// A text that is no full commit id, or no full ref name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: `{text}`")]
pub struct InvalidName {
    what: &'static str,
    text: String,
}

impl InvalidName {
    fn new(what: &'static str, text: &str) -> Self {
        Self { what, text: text.chars().take(80).flat_map(char::escape_default).collect() }
    }
}

/// A full commit id: 40 (SHA-1) or 64 (SHA-256) lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Revision(String);

impl Revision {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first ten digits, for people.
    pub fn short(&self) -> &str {
        &self.0[..10]
    }
}

impl FromStr for Revision {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let hexadecimal = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if hexadecimal && matches!(text.len(), 40 | 64) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::new("not a full commit id (40 or 64 lower-case hexadecimal digits)", text))
        }
    }
}

/// A full ref name below `refs/`, as `git check-ref-format` accepts it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RefName(String);

impl RefName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The branch's name, if it is one: `main` of `refs/heads/main`.
    pub fn branch(&self) -> Option<&str> {
        self.0.strip_prefix("refs/heads/")
    }

    /// The tag's name, if it is one.
    pub fn tag(&self) -> Option<&str> {
        self.0.strip_prefix("refs/tags/")
    }

    /// The name without `refs/heads/` or `refs/tags/`, for people.
    pub fn short(&self) -> &str {
        self.branch().or_else(|| self.tag()).unwrap_or(&self.0)
    }
}

impl FromStr for RefName {
    type Err = InvalidName;

    /// The rules of git-check-ref-format(1), for a full name below `refs/`, at most 1,024 bytes.
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let refuse = || InvalidName::new("not a full ref name (`refs/heads/main`)", text);
        let Some(rest) = text.strip_prefix("refs/") else { return Err(refuse()) };
        let forbidden =
            |c: char| c.is_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\');
        let component_is_bad =
            |part: &str| part.is_empty() || part.starts_with('.') || part.ends_with(".lock");
        if text.len() > 1024
            || !rest.contains('/')
            || text.contains(forbidden)
            || text.contains("..")
            || text.contains("@{")
            || text.ends_with('.')
            || rest.split('/').any(component_is_bad)
        {
            return Err(refuse());
        }
        Ok(Self(text.to_owned()))
    }
}

macro_rules! text_like {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
text_like!(Revision);
text_like!(RefName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_a_full_lower_case_commit_id() {
        assert!("a".repeat(40).parse::<Revision>().is_ok());
        assert!("0".repeat(64).parse::<Revision>().is_ok());
        for bad in
            ["", "abc123", "HEAD", "--upload-pack=x", &"A".repeat(40), &"g".repeat(40), &"a".repeat(41)]
        {
            assert!(bad.parse::<Revision>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_ref_name_follows_gits_rules() {
        for good in [
            "refs/heads/main",
            "refs/tags/v1.0",
            "refs/heads/release/1.x",
            "refs/pull/7/head",
            "refs/heads/é",
        ] {
            assert!(good.parse::<RefName>().is_ok(), "{good}");
        }
        for bad in [
            "main",
            "refs/heads",
            "refs/heads/",
            "refs/heads/a..b",
            "refs/heads/.a",
            "refs/heads/a.lock",
            "refs/heads/a b",
            "refs/heads/a\nb",
            "refs/heads/a~1",
            "refs/heads/@{x",
            "refs/heads/a.",
            "refs//heads/a",
            "-refs/heads/a",
        ] {
            assert!(bad.parse::<RefName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn push_or_tag_follows_from_the_ref() {
        let kind = |name: &str| Event::kind_of_ref(&name.parse().unwrap());
        assert_eq!(kind("refs/tags/v1"), EventKind::Tag);
        assert_eq!(kind("refs/heads/tags/v1"), EventKind::Push);
    }
}
