//! Reads errors: writes one and all that led to it in one line, for messages that travel without their sources, and tells a full
//! disk from the rest.

use std::error::Error;
use std::io;

/// The error and its causes, each once: some messages hold their cause's text already.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

/// Whether there was no room on the disk.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Sample {
        #[error("deep")]
        Deep,
        #[error("middle: {0}")]
        Middle(#[source] Box<Sample>),
        #[error("top")]
        Top(#[source] Box<Sample>),
    }

    #[test]
    fn each_cause_is_told_once() {
        let error = Sample::Top(Box::new(Sample::Middle(Box::new(Sample::Deep))));
        assert_eq!(with_causes(&error), "top: middle: deep");
    }
}
