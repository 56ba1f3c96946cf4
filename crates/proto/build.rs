//! Compiles the gRPC contracts, without a system `protoc`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("../../api/proto");
    let files = ["sealci/agent/v1/agent.proto", "sealci/scheduler/v1/scheduler.proto"];
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(files, [root])?;
    tonic_prost_build::configure().bytes(".sealci.agent.v1.LogChunk.data").compile_fds(descriptors)?;
    Ok(())
}
