//! Reads what any value can be: a text, a list, a mapping, a section with known keys. Each reader complains where it gives
//! nothing, so that its caller just goes on.

use super::MAX_ITEMS;
use super::error::{Complaints, ManifestErrorKind};
use super::keys::{self, Section};
use super::source::{Span, quoted};
use super::tree::{Content, Entry, Node};
use super::values::Refusal;

/// The entry with this key.
pub(super) fn find<'n, 't>(entries: &'n [Entry<'t>], key: &str) -> Option<&'n Entry<'t>> {
    entries.iter().find(|entry| entry.key == key)
}

/// What all readers need: the text that the tree is of, and where they complain.
pub(super) struct Reader<'c> {
    pub(super) source: &'c str,
    pub(super) complaints: &'c mut Complaints,
}

impl Reader<'_> {
    pub(super) fn complain(
        &mut self,
        kind: ManifestErrorKind,
        span: Span,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.complaints.add(kind, span, message, mend);
    }

    /// The value where `parse` takes the text; its refusal goes on after the key.
    pub(super) fn parsed<'n, T>(
        &mut self,
        entry: &'n Entry<'_>,
        wanted: &str,
        parse: impl FnOnce(&'n str) -> Result<T, Refusal>,
    ) -> Option<T> {
        let text = self.text(entry, wanted)?;
        let parsed = parse(text).map_err(|refusal| Refusal {
            message: format!("{}: {}", quoted(&entry.key), refusal.message),
            ..refusal
        });
        self.taken(entry.value.span, parsed)
    }

    /// The value, or a complaint that says why there is none.
    pub(super) fn taken<T>(&mut self, span: Span, result: Result<T, Refusal>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(refusal) => {
                self.complain(ManifestErrorKind::Value, span, refusal.message, refusal.mend);
                None
            }
        }
    }

    pub(super) fn text<'n>(&mut self, entry: &'n Entry<'_>, wanted: &str) -> Option<&'n str> {
        match &entry.value.content {
            Content::Text(text) => self.plain(text, entry.value.span),
            _ => self.wrong_shape(entry, wanted),
        }
    }

    /// The text, unless it holds what no value may.
    pub(super) fn plain<'n>(&mut self, text: &'n str, span: Span) -> Option<&'n str> {
        if text.contains("${{") {
            let message = "expressions (`${{ … }}`) are not offered yet";
            let mend = "write the value itself; commands can use variables: `$SEALCI_REF`";
            self.complain(ManifestErrorKind::NotOffered, span, message, mend);
            return None;
        }
        if text.contains('\0') {
            let mend = "remove the escape `\\0`: no variable or argument can hold that character";
            self.complain(ManifestErrorKind::Value, span, "the text has the character U+0000", mend);
            return None;
        }
        Some(text)
    }

    /// The value of a text that is one of few.
    pub(super) fn one_of<T: Copy>(&mut self, entry: &Entry<'_>, choices: &[(&'static str, T)]) -> Option<T> {
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("`{name}`")).collect();
        let wanted = format!("one of {}", names.join(", "));
        self.parsed(entry, &wanted, |text| {
            choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
                let mend = match keys::nearest(text, choices.iter().map(|(name, _)| *name)) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("write {wanted}"),
                };
                Refusal::new(format!("{} is not {wanted}", quoted(text)), mend)
            })
        })
    }

    /// The texts of a list, without those that hold what no value may.
    pub(super) fn words(&mut self, entry: &Entry<'_>, wanted: &str) -> Option<Vec<String>> {
        self.items(entry, wanted, |text| Ok(text.to_owned()))
    }

    /// What `parse` takes of the texts of a list.
    pub(super) fn items<T>(
        &mut self,
        entry: &Entry<'_>,
        wanted: &str,
        parse: impl Fn(&str) -> Result<T, Refusal>,
    ) -> Option<Vec<T>> {
        let mut taken = Vec::new();
        for (text, span) in self.texts(entry, wanted)? {
            if let Some(text) = self.plain(text, span) {
                taken.extend(self.taken(span, parse(text)));
            }
        }
        Some(taken)
    }

    /// The texts of a list, each as it was written.
    pub(super) fn texts<'n>(&mut self, entry: &'n Entry<'_>, wanted: &str) -> Option<Vec<(&'n str, Span)>> {
        let items = self.list(entry, wanted)?;
        if let Some(over) = items.get(MAX_ITEMS) {
            let message = format!("{} entries, at most {MAX_ITEMS} are taken", items.len());
            self.complain(ManifestErrorKind::Limit, over.span, message, "remove some");
            return None;
        }
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            match &item.content {
                Content::Text(text) => texts.push((&**text, item.span)),
                Content::Refused => {}
                content => {
                    let message = format!("{} lists texts; {}", quoted(&entry.key), content.describe());
                    self.complain(ManifestErrorKind::Shape, item.span, message, "write a text");
                }
            }
        }
        Some(texts)
    }

    pub(super) fn wrong_shape<T>(&mut self, entry: &Entry<'_>, wanted: &str) -> Option<T> {
        let key = quoted(&entry.key);
        match &entry.value.content {
            Content::Refused => {}
            Content::Nothing => {
                let message = format!("{key} has no value");
                let mend = format!("write {wanted}, or leave the key out");
                self.complain(ManifestErrorKind::Missing, entry.key_span, message, mend);
            }
            content => {
                let message = format!("{key} wants {wanted}; {}", content.describe());
                let mend = format!("write {wanted}");
                self.complain(ManifestErrorKind::Shape, entry.value.span, message, mend);
            }
        }
        None
    }

    pub(super) fn list<'n, 't>(&mut self, entry: &'n Entry<'t>, wanted: &str) -> Option<&'n [Node<'t>]> {
        match &entry.value.content {
            Content::Sequence(items) => Some(items),
            _ => self.wrong_shape(entry, wanted),
        }
    }

    pub(super) fn mapping<'n, 't>(&mut self, entry: &'n Entry<'t>, wanted: &str) -> Option<&'n [Entry<'t>]> {
        match &entry.value.content {
            Content::Mapping(entries) => Some(entries),
            _ => self.wrong_shape(entry, wanted),
        }
    }

    /// Complains about keys that the section does not take.
    pub(super) fn fields<'n, 't>(&mut self, entries: &'n [Entry<'t>], section: &Section) -> &'n [Entry<'t>] {
        for entry in entries {
            let key: &str = &entry.key;
            if section.offered.contains(&key) {
                continue;
            }
            if self.complaints.is_full() {
                self.complaints.omit();
            } else if section.later.contains(&key) {
                let message = format!("{} is not offered yet", quoted(key));
                let mend = keys::mend_of_later(key);
                self.complain(ManifestErrorKind::NotOffered, entry.key_span, message, mend);
            } else {
                let message = format!("{} is no key of {}", quoted(key), section.what);
                let mend = keys::mend_of_unknown(key, section);
                self.complain(ManifestErrorKind::UnknownKey, entry.key_span, message, mend);
            }
        }
        entries
    }
}
