//! Holds the REST documents as Rust: their types, and a typed client for each.

/// The controller's: `api/openapi/controller.yaml`.
#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used, rust_2018_idioms, irrefutable_let_patterns)]
pub mod controller {
    include!(concat!(env!("OUT_DIR"), "/controller.rs"));
}

/// The monitor's: `api/openapi/monitor.yaml`.
#[allow(clippy::all, clippy::unwrap_used, clippy::expect_used, rust_2018_idioms, irrefutable_let_patterns)]
pub mod monitor {
    include!(concat!(env!("OUT_DIR"), "/monitor.rs"));
}
