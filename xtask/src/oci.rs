//! Makes images of Debian's packages, as OCI layouts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Debian's packages of a variant of mmdebstrap's, and these with what they need, as the archive that a layer is.
pub fn debian(variant: &str, packages: &str, to: &Path) -> Result<()> {
    let status = Command::new("mmdebstrap")
        .args(["--quiet", "--skip=output/dev", "--format=tar"])
        .arg(format!("--variant={variant}"))
        .arg(format!("--include={packages}"))
        .arg("bookworm")
        .arg(to)
        .status()
        .context("cannot run mmdebstrap")?;
    if status.success() { Ok(()) } else { bail!("mmdebstrap ended with {status}") }
}

/// Makes the folder `place` of these layers, lowest first, which are moved there.
pub fn layout(place: &Path, layers: impl IntoIterator<Item = PathBuf>) -> Result<()> {
    let blobs = place.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layers: Vec<Blob> = layers.into_iter().map(|layer| put(&blobs, &layer)).collect::<Result<_>>()?;
    let config = json!({
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>()},
    });
    let config = put_json(&blobs, &config)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": layers
            .iter()
            .map(|layer| layer.descriptor("application/vnd.oci.image.layer.v1.tar"))
            .collect::<Vec<_>>(),
    });
    let manifest = put_json(&blobs, &manifest)?.descriptor("application/vnd.oci.image.manifest.v1+json");
    fs::write(place.join("index.json"), json!({"schemaVersion": 2, "manifests": [manifest]}).to_string())?;
    Ok(fs::write(place.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?)
}

struct Blob {
    digest: String,
    size: u64,
}

impl Blob {
    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.size})
    }
}

/// Moves a file to where its content says.
fn put(blobs: &Path, file: &Path) -> Result<Blob> {
    let output = Command::new("sha256sum").arg(file).output().context("cannot run sha256sum")?;
    let text = String::from_utf8(output.stdout)?;
    let hex = text.split_whitespace().next().context("sha256sum said nothing")?;
    let size = fs::metadata(file)?.len();
    fs::rename(file, blobs.join(hex))?;
    Ok(Blob { digest: format!("sha256:{hex}"), size })
}

fn put_json(blobs: &Path, value: &Value) -> Result<Blob> {
    let file = blobs.join("partial");
    fs::write(&file, value.to_string())?;
    put(blobs, &file)
}
