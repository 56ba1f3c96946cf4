//! Holds what every service needs and none is about: databases, listeners, tokens, problems, telemetry, shutdown.
//!
//! Nothing here knows what CI is.

pub mod auth;
pub mod database;
pub mod listen;
pub mod problem;
pub mod shutdown;
pub mod telemetry;
