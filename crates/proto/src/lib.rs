//! Holds the gRPC contracts as Rust, and the only conversions between them and the core's values.

#[allow(clippy::all, clippy::unwrap_used)]
mod generated {
    // The nesting is the packages': the generated code names its neighbours by it.
    pub mod agent {
        pub mod v1 {
            tonic::include_proto!("sealci.agent.v1");
        }
    }
    pub mod scheduler {
        pub mod v1 {
            tonic::include_proto!("sealci.scheduler.v1");
        }
    }
}

/// Between agents and schedulers: `api/proto/sealci/agent/v1`.
pub use generated::agent::v1 as agent;
/// Between controllers and schedulers: `api/proto/sealci/scheduler/v1`.
pub use generated::scheduler::v1 as scheduler;

mod convert;
mod versions;

pub use convert::{
    MAX_LOG_CHUNK_BYTES, Malformed, attempt_id, log_range, network_from_wire, network_to_wire,
};
pub use versions::Versions;

/// The protocol versions that this release speaks: what its contracts describe, and the release's before it.
pub const PROTOCOLS: Versions = Versions { min: 1, max: 1 };
