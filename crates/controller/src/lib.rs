//! Owns the truth: turns events and manifests into pipelines, and records what becomes of them.
//!
//! Rooms: `intake` makes a request into a plan, `dispatch` drives the pipelines (the only writer), `store` is the
//! database, `api` the REST doors. The core decides; nothing is answered before it is durable.

pub mod api;
pub mod dispatch;
pub mod intake;
pub mod store;
pub mod watchers;
