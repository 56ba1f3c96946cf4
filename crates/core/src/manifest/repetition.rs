//! Reads how often an action is tried again, and whether its attempts may overlap.

use super::MAX_RETRIES;
use super::error::ManifestErrorKind;
use super::keys;
use super::reader::{Reader, find};
use super::source::quoted;
use super::tree::{Content, Entry};
use super::values::Refusal;
use crate::plan::{Retry, RetryOn};

/// What `retry` means that names no ends: neither a failure nor an error is believed at once.
const DEFAULT_ON: [RetryOn; 2] = [RetryOn::Failed, RetryOn::Errored];

const WANTED: &str = "a mapping with `times` (`{times: 2, on: [failed]}`)";
const WANTED_ENDS: &str = "a list of `failed`, `errored`, `timed_out`";

impl Reader<'_> {
    pub(super) fn retry(&mut self, entry: &Entry<'_>) -> Option<Retry> {
        let entries = self.mapping(entry, WANTED)?;
        let fields = self.fields(entries, &keys::RETRY);
        let on = find(fields, "on").map(|entry| self.ends(entry));
        let Some(times) = find(fields, "times") else {
            let mend = "say how many further attempts there may be: `times: 2`";
            self.complain(ManifestErrorKind::Missing, entry.key_span, "`retry` has no `times`", mend);
            return None;
        };
        let times = self.parsed(times, "a number", retries)?;
        Some(Retry { times, on: on.unwrap_or_else(|| DEFAULT_ON.to_vec()) })
    }

    pub(super) fn exclusive(&mut self, entry: &Entry<'_>) -> Option<bool> {
        self.one_of(entry, &[("true", true), ("false", false)])
    }

    fn ends(&mut self, entry: &Entry<'_>) -> Vec<RetryOn> {
        let texts = self.texts(entry, WANTED_ENDS).unwrap_or_default();
        if matches!(&entry.value.content, Content::Sequence(items) if items.is_empty()) {
            let mend = "name an end, or leave `retry` out";
            self.complain(ManifestErrorKind::Missing, entry.value.span, "`on` lists nothing", mend);
        }
        let mut ends = Vec::new();
        for (text, span) in texts {
            let Some(text) = self.plain(text, span) else { continue };
            let Some(end) = self.taken(span, end(text)) else { continue };
            if ends.contains(&end) {
                let message = format!("{} is there twice", quoted(text));
                self.complain(ManifestErrorKind::Duplicate, span, message, "name it once");
            } else {
                ends.push(end);
            }
        }
        ends
    }
}

fn retries(text: &str) -> Result<u32, Refusal> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    match text.parse::<u32>() {
        Ok(times @ 1..=MAX_RETRIES) if plain => Ok(times),
        _ => {
            let message = format!("{} is no number of retries", quoted(text));
            Err(Refusal::new(
                message,
                format!("write a number from 1 to {MAX_RETRIES}, or leave `retry` out"),
            ))
        }
    }
}

fn end(text: &str) -> Result<RetryOn, Refusal> {
    RetryOn::parse(text).ok_or_else(|| {
        let mend = match keys::nearest(text, RetryOn::ALL.iter().map(|end| end.as_str())) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("write {WANTED_ENDS}"),
        };
        Refusal::new(format!("{} is no end after which an action can be tried again", quoted(text)), mend)
    })
}
