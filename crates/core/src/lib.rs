//! Holds what SealCI is about, as values: ids, events, manifests and plans, the state machines of pipelines, actions
//! and attempts, and log addressing.
//!
//! This crate does no I/O, reads no clock, no environment and no randomness, and knows no database and no wire format.
//! What it needs of those comes in as arguments.

pub mod attempt;
pub mod destination;
pub mod event;
pub mod ids;
pub mod manifest;
pub mod outcome;
pub mod pipeline;
pub mod plan;
pub mod repository;
pub mod retry;
pub mod template;
