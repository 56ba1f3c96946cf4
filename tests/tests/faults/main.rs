//! Causes faults and holds what comes of them against the invariants: one row of docs/faults.md for each test.
//!
//! - Every test measures its row's figure, and says what it had to be. `cargo xtask faults` runs all and writes the table.
//! - What an action printed and how often it ran is known from files outside of SealCI (`oracle`).
//! - Tests run on a tenth of every period; those that say `as_shipped` take minutes and are run by `cargo xtask faults`
//!   alone.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod agents;
mod endings;
mod fleet;
mod lines;
mod logs;
mod oracle;
mod replicas;
mod rooms;
mod row;
mod schedulers;
mod services;
