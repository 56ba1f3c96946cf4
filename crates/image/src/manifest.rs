//! Reads manifests, indexes and configurations (image-spec 1.1; Docker's schema 2, which is the same with other media types).
//!
//! Pure: bytes in, values out. Everything is bounded by whoever reads the bytes.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::image::ImageConfig;
use crate::platform::Platform;

/// What is asked for.
pub(crate) const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// The specification lets a registry refuse manifests above it.
pub(crate) const MANIFEST_BYTES: u64 = 4 << 20;
pub(crate) const CONFIG_BYTES: u64 = 4 << 20;
/// overlayfs takes no more of them.
const MOST_LAYERS: usize = 500;
const MOST_MANIFESTS: usize = 1000;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// What a configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configuration {
    pub platform: Platform,
    pub diff_ids: Vec<Digest>,
    pub config: ImageConfig,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// An index or a manifest.
pub(crate) fn document(bytes: &[u8]) -> Result<Document, String> {
    let raw: RawDocument =
        serde_json::from_slice(bytes).map_err(|error| format!("its manifest is not one ({error})"))?;
    if raw.schema_version != 2 {
        return Err(format!(
            "its manifest is of schema {}, and only 2 is supported (pushing it with a newer Docker converts it)",
            raw.schema_version
        ));
    }
    // A document that could be read both ways could be taken for two images (CVE-2021-41190).
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) if manifests.len() <= MOST_MANIFESTS => Ok(Document::Index(manifests)),
        (None, Some(config), Some(layers)) => {
            if layers.len() > MOST_LAYERS {
                return Err(format!("it has {} layers, and {MOST_LAYERS} are supported", layers.len()));
            }
            if let Some(layer) = layers.iter().find(|layer| layer.media_type.ends_with("+encrypted")) {
                return Err(format!(
                    "its layer {} is encrypted, which is not supported",
                    layer.digest.short()
                ));
            }
            Ok(Document::Manifest(Manifest { config, layers }))
        }
        (manifests, config, layers) => Err(format!(
            "its manifest is neither an index nor a manifest (media type {:?}, manifests {}, config {}, layers {})",
            raw.media_type.unwrap_or_default(),
            manifests.is_some(),
            config.is_some(),
            layers.is_some()
        )),
    }
}

/// Of an index, the entry for this machine; else what there is, for people.
pub(crate) fn choose<'a>(manifests: &'a [Descriptor], machine: &Platform) -> Result<&'a Descriptor, String> {
    let fitness = |descriptor: &Descriptor| match &descriptor.platform {
        Some(platform) => machine.fitness(platform),
        // One that does not say may be anything; its configuration is looked at.
        None => Some(0),
    };
    let is_image = |descriptor: &&Descriptor| {
        descriptor.media_type.is_empty() || ACCEPTED.contains(&descriptor.media_type.as_str())
    };
    let mut best: Option<(u32, &Descriptor)> = None;
    for descriptor in manifests.iter().filter(is_image) {
        // The first of equals, as the specification has it.
        if let Some(fitness) = fitness(descriptor)
            && best.is_none_or(|(most, _)| fitness > most)
        {
            best = Some((fitness, descriptor));
        }
    }
    best.map(|(_, descriptor)| descriptor).ok_or_else(|| {
        let platforms = manifests.iter().filter_map(|descriptor| descriptor.platform.as_ref());
        let mut names: Vec<_> =
            platforms.filter(|platform| platform.os != "unknown").map(ToString::to_string).collect();
        names.sort();
        names.dedup();
        names.truncate(30);
        if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
    })
}

#[derive(Deserialize)]
struct RawConfiguration {
    // Not a flattened `Platform`: serde would keep all that is unknown in memory meanwhile, many times its size.
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    rootfs: RawRootfs,
    #[serde(default)]
    config: Option<RawConfig>,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

/// Go writes empty lists and maps as null.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

pub(crate) fn configuration(bytes: &[u8]) -> Result<Configuration, String> {
    let raw: RawConfiguration =
        serde_json::from_slice(bytes).map_err(|error| format!("its configuration is not one ({error})"))?;
    let config = raw.config.unwrap_or_default();
    let variable = |text: String| match text.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (text, String::new()),
    };
    Ok(Configuration {
        platform: Platform { os: raw.os, architecture: raw.architecture, variant: raw.variant },
        diff_ids: raw.rootfs.diff_ids,
        config: ImageConfig {
            entrypoint: config.entrypoint.unwrap_or_default(),
            command: config.cmd.unwrap_or_default(),
            env: config.env.unwrap_or_default().into_iter().map(variable).collect(),
            user: config.user.unwrap_or_default(),
            working_folder: config.working_dir.unwrap_or_default(),
            labels: config.labels.unwrap_or_default(),
            stop_signal: config.stop_signal.unwrap_or_default(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, byte: u8, platform: &str) -> String {
        let digest = Digest::of(&[byte]);
        format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":1{platform}}}"#)
    }

    #[test]
    fn documents_are_told_apart() {
        let entry = descriptor(ACCEPTED[1], 1, "");
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{entry}]}}"#);
        assert!(matches!(document(index.as_bytes()), Ok(Document::Index(list)) if list.len() == 1));
        let manifest = format!(r#"{{"schemaVersion":2,"config":{entry},"layers":[{entry}]}}"#);
        assert!(matches!(document(manifest.as_bytes()), Ok(Document::Manifest(_))));
        for (bad, part) in [
            (format!(r#"{{"schemaVersion":2,"manifests":[],"config":{entry},"layers":[]}}"#), "neither"),
            (r#"{"schemaVersion":1}"#.to_owned(), "schema 1"),
            ("[]".to_owned(), "not one"),
            ("{".to_owned(), "not one"),
            (
                r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:../../x","size":1}]}"#.to_owned(),
                "not a digest",
            ),
            (r#"{"schemaVersion":2,"manifests":[{"digest":"x","size":-1}]}"#.to_owned(), "not one"),
            (
                format!(
                    r#"{{"schemaVersion":2,"config":{entry},"layers":[{}]}}"#,
                    descriptor("a+encrypted", 1, "")
                ),
                "encrypted",
            ),
        ] {
            let error = document(bad.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{bad}: {error}");
        }
    }

    #[test]
    fn attestations_are_no_images() {
        let platform =
            |os, architecture| format!(r#","platform":{{"os":"{os}","architecture":"{architecture}"}}"#);
        let list = [
            descriptor(ACCEPTED[1], 1, &platform("unknown", "unknown")),
            descriptor("application/vnd.example.thing", 2, &platform("linux", "amd64")),
            descriptor(ACCEPTED[1], 3, &platform("linux", "amd64")),
            descriptor(ACCEPTED[1], 4, &platform("linux", "s390x")),
        ];
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, list.join(","));
        let Ok(Document::Index(list)) = document(index.as_bytes()) else { panic!("{index}") };
        let machine = |architecture: &str| Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: None,
        };
        assert_eq!(choose(&list, &machine("amd64")).unwrap().digest, Digest::of(&[3]));
        assert_eq!(choose(&list, &machine("riscv64")).unwrap_err(), "linux/amd64, linux/s390x");
    }

    #[test]
    fn a_configuration_may_leave_out_anything_but_layers() {
        let text = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
            "config":{"Env":["A=b=c","D"],"Cmd":null,"Entrypoint":["/init"],"User":"1:2","WorkingDir":"/w",
            "Labels":{"k":"v"},"StopSignal":"SIGINT"}}"#;
        let config = configuration(text.as_bytes()).unwrap().config;
        assert_eq!(config.env, BTreeMap::from([("A".into(), "b=c".into()), ("D".into(), String::new())]));
        assert_eq!((config.entrypoint, config.command), (vec!["/init".to_owned()], Vec::new()));
        assert_eq!((config.user.as_str(), config.working_folder.as_str()), ("1:2", "/w"));
        assert_eq!((config.labels["k"].as_str(), config.stop_signal.as_str()), ("v", "SIGINT"));
        let bare = configuration(br#"{"rootfs":{}}"#).unwrap();
        assert_eq!(bare.config, ImageConfig::default());
        assert!(configuration(b"{}").is_err());
    }
}
