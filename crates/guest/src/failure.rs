//! Says what could not be done, for a person.

use std::fmt;
use std::io;

/// What was tried, and what the kernel said of it.
#[derive(Debug)]
pub struct Failure {
    doing: String,
    source: io::Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.doing, self.source)
    }
}

/// Adds to an error what was being done.
pub trait While<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> While<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|source| Failure { doing: what(), source })
    }
}
