//! Fills in texts with `${{ … }}` in them, as a cache's key has them.
//!
//! ```text
//! template    (text | "${{" expression "}}")*
//! expression  "hash(" pattern ("," pattern)* ")" | "event.ref" | "event.branch" | "event.tag" | "event.revision"
//! pattern     a text in single or double quotes
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// Patterns in all of a template's `hash(…)` together.
const MAX_PATTERNS: usize = 32;

/// A text in which some things are filled in later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Template {
    source: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Hash(Vec<String>),
    Event(EventValue),
}

/// What of an event a template can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventValue {
    Ref,
    /// Empty where the ref is no branch.
    Branch,
    /// Empty where the ref is no tag.
    Tag,
    Revision,
}

impl EventValue {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Ref, "event.ref"),
        (Self::Branch, "event.branch"),
        (Self::Tag, "event.tag"),
        (Self::Revision, "event.revision"),
    ];
}

/// Why a text is no template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}; {mend}")]
pub struct InvalidTemplate {
    /// A sentence without an end.
    pub message: String,
    /// What to do.
    pub mend: String,
}

/// What a template is filled in with.
pub trait Values {
    type Error;

    /// A digest, in hexadecimal, of the repository's files that match one of the patterns: of their paths and contents.
    fn hash(&self, patterns: &[String]) -> Result<String, Self::Error>;

    fn event(&self, value: EventValue) -> String;
}

impl Template {
    /// Reads one.
    pub fn parse(source: &str) -> Result<Self, InvalidTemplate> {
        let mut parts = Vec::new();
        let mut rest = source;
        while let Some(start) = rest.find("${{") {
            let (text, expression) = (&rest[..start], &rest[start + 3..]);
            let end = expression.find("}}").ok_or_else(|| {
                InvalidTemplate::new("`${{` has no `}}`", "close it, or write the text without `${{`")
            })?;
            if !text.is_empty() {
                parts.push(Part::Text(text.to_owned()));
            }
            parts.push(Part::parse(expression[..end].trim())?);
            rest = &expression[end + 2..];
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        let patterns = |part: &Part| if let Part::Hash(patterns) = part { patterns.len() } else { 0 };
        if parts.iter().map(patterns).sum::<usize>() > MAX_PATTERNS {
            let message = format!("more than {MAX_PATTERNS} patterns to hash");
            return Err(InvalidTemplate::new(message, "hash one file that names the others"));
        }
        Ok(Self { source: source.to_owned(), parts })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.source
    }

    /// The text, with everything filled in.
    pub fn expand<V: Values>(&self, values: &V) -> Result<String, V::Error> {
        let mut text = String::with_capacity(self.source.len());
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Hash(patterns) => text.push_str(&values.hash(patterns)?),
                Part::Event(value) => text.push_str(&values.event(*value)),
            }
        }
        Ok(text)
    }
}

impl Part {
    fn parse(expression: &str) -> Result<Self, InvalidTemplate> {
        if let Some((value, _)) = EventValue::ALL.iter().find(|(_, name)| *name == expression) {
            return Ok(Self::Event(*value));
        }
        let arguments = expression.strip_prefix("hash").map(str::trim_start);
        let Some(arguments) = arguments.and_then(|text| text.strip_prefix('(')?.strip_suffix(')')) else {
            let names: Vec<&str> = EventValue::ALL.iter().map(|(_, name)| *name).collect();
            let shown: String = expression.chars().take(60).collect();
            return Err(InvalidTemplate::new(
                format!("`{shown}` is no expression that is offered here yet"),
                format!("write `hash('Cargo.lock')` or one of {}", names.join(", ")),
            ));
        };
        patterns(arguments).map(Self::Hash)
    }
}

/// Quoted texts, with commas between them.
fn patterns(arguments: &str) -> Result<Vec<String>, InvalidTemplate> {
    let wrong = || {
        InvalidTemplate::new(
            "`hash` takes patterns of file names, in quotes",
            "write `hash('Cargo.lock')` or `hash('**/*.toml', 'Cargo.lock')`",
        )
    };
    let mut patterns = Vec::new();
    let mut rest = arguments.trim();
    loop {
        let quote = rest.chars().next().filter(|quote| matches!(quote, '\'' | '"')).ok_or_else(wrong)?;
        let (pattern, after) = rest[1..].split_once(quote).ok_or_else(wrong)?;
        if pattern.is_empty() {
            return Err(wrong());
        }
        patterns.push(pattern.to_owned());
        rest = after.trim_start();
        if rest.is_empty() {
            return Ok(patterns);
        }
        rest = rest.strip_prefix(',').ok_or_else(wrong)?.trim_start();
    }
}

impl InvalidTemplate {
    fn new(message: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { message: message.into(), mend: mend.into() }
    }
}

impl TryFrom<String> for Template {
    type Error = InvalidTemplate;

    fn try_from(source: String) -> Result<Self, InvalidTemplate> {
        Self::parse(&source)
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        template.source
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shown;

    impl Values for Shown {
        type Error = std::convert::Infallible;

        fn hash(&self, patterns: &[String]) -> Result<String, Self::Error> {
            Ok(format!("<{}>", patterns.join("|")))
        }

        fn event(&self, value: EventValue) -> String {
            format!("{value:?}")
        }
    }

    #[test]
    fn what_is_in_braces_is_filled_in() {
        for (source, expected) in [
            ("", ""),
            ("plain $x {y}", "plain $x {y}"),
            ("cargo-${{ hash('Cargo.lock') }}", "cargo-<Cargo.lock>"),
            ("${{hash ( \"a b\" , '*.x' )}}-${{ event.branch }}!", "<a b|*.x>-Branch!"),
            ("${{event.ref}}${{event.tag}}${{event.revision}}", "RefTagRevision"),
        ] {
            let template = Template::parse(source).unwrap();
            assert_eq!(template.expand(&Shown), Ok(expected.to_owned()), "{source}");
            assert_eq!(template.as_str(), source);
        }
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for source in [
            "${{ hash('a')",
            "${{ }}",
            "${{ hash() }}",
            "${{ hash('') }}",
            "${{ hash(a) }}",
            "${{ hash('a' 'b') }}",
            "${{ hash('a',) }}",
            "${{ hash('a) }}",
            "${{ matrix.rust }}",
            "${{ event.branch + 'x' }}",
        ] {
            assert!(Template::parse(source).is_err(), "{source}");
        }
        let many = "${{ hash('a') }}".repeat(33);
        assert!(Template::parse(&many).is_err());
    }
}
