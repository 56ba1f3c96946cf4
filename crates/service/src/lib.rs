//! Gives every service what all of them need around what they do: logging, listening, errors over HTTP, tokens, a
//! database connection, and an orderly end.
//!
//! This crate knows nothing of CI: no pipelines, agents or repositories.

pub mod auth;
pub mod database;
pub mod listen;
pub mod problem;
pub mod shutdown;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tls;
