//! Plays whole histories of an installation in one thread, on one clock, from a seed: the scheduler's state machine, the
//! agents' spools, attempts and sessions, and the controllers' drivers over SQLite are the real ones; the network between them,
//! the time and the executor are not. For tests alone.
//!
//! - A history is its seed: nothing in it depends on the machine's speed, clock or randomness.
//! - Each step is one thing: a message arrives, a round is committed, a process dies.
//! - What is checked in the end is what an oracle knows that saw everything printed and everything said ([`oracle`]).
#![allow(clippy::unwrap_used, clippy::expect_used)] // what fails here should fail the test

pub mod agents;
pub mod controllers;
pub mod faults;
pub mod history;
pub mod line;
pub mod oracle;
pub mod plans;
pub mod scenario;
pub mod schedulers;
pub mod spools;
pub mod trace;
pub mod wishes;
pub mod world;
