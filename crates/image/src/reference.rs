//! Says which image is meant, and where it comes from.
//!
//! ```text
//! debian:bookworm                                  docker.io/library/debian, tag bookworm
//! registry.example.org:5000/team/image:tag@sha256:…  the digest decides, the tag is for people
//! oci:NAME[:TAG]                                   an OCI layout folder below the images folder
//! docker-archive:NAME                              a file made by `docker save`, below the same
//! ```
//! Names are as in the distribution specification ("Pulling manifests") and, for what is left out, as Docker reads them: the
//! first part is a registry if it has a dot or a colon or is `localhost`.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::digest::{Digest, NotADigest};

/// Where an image that is named without one comes from.
pub const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";

/// Longest name and tag (distribution specification).
const NAME_BYTES: usize = 255;
const TAG_BYTES: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageReference {
    Registry(RegistryReference),
    /// An OCI layout folder.
    Layout {
        folder: PathBuf,
        tag: Option<String>,
    },
    /// A file as `docker save` makes it.
    Archive {
        file: PathBuf,
    },
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryReference {
    /// `docker.io`, `registry.example.org:5000`.
    pub registry: String,
    /// `library/debian`.
    pub repository: String,
    pub tag: Option<String>,
    /// Decides where both are named.
    pub digest: Option<Digest>,
}

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    #[error("an image needs a name, such as `debian:bookworm`")]
    Empty,
    #[error(
        "`{0}` has spaces or characters that no image name has; an image is named like `debian:bookworm`"
    )]
    Characters(String),
    #[error(
        "`{0}` is an address; name the image without `https://`, as in `registry.example.org/team/image:tag`"
    )]
    Scheme(String),
    #[error("`{name}` has upper-case letters; registries know image names in lower case only: `{lower}`")]
    UpperCase { name: String, lower: String },
    #[error(
        "`{0}` is no image name: parts of lower-case letters, digits, `.`, `_`, `-` between slashes, at most 255 characters"
    )]
    Name(String),
    #[error("`{0}` is no registry: a host name or address, with `:PORT` where it has one")]
    Registry(String),
    #[error(
        "`{0}` is no tag: letters, digits, `_`, `.`, `-`, at most 128, and it begins with a letter, a digit or `_`"
    )]
    Tag(String),
    #[error("behind the `@`, {0}")]
    Digest(#[from] NotADigest),
    #[error(
        "`{0}` leads out of the images folder; name a folder or file below it, without `..` and not from `/`"
    )]
    Outside(String),
}

impl ImageReference {
    /// Whether it can never mean another image than it does now.
    pub fn is_pinned(&self) -> bool {
        matches!(self, Self::Registry(reference) if reference.digest.is_some())
    }
}

impl FromStr for ImageReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if let Some(name) = text.strip_prefix("oci:") {
            return layout(name);
        }
        if let Some(name) = text.strip_prefix("docker-archive:") {
            return Ok(Self::Archive { file: below(name)? });
        }
        text.parse().map(Self::Registry)
    }
}

impl FromStr for RegistryReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let shown = || text.chars().take(100).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        if text.contains("://") {
            return Err(ReferenceError::Scheme(shown()));
        }
        if text.len() > 1000 || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ReferenceError::Characters(shown()));
        }
        let (named, digest) = match text.split_once('@') {
            Some((named, digest)) => (named, Some(digest.parse()?)),
            None => (text, None),
        };
        let (registry, rest) = match named.split_once('/') {
            Some((first, rest)) if is_registry(first) => (registry(first)?, rest),
            _ => (DEFAULT_REGISTRY.to_owned(), named),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) => (name, Some(checked_tag(tag)?)),
            None => (rest, None),
        };
        let is_official = registry == DEFAULT_REGISTRY && !name.contains('/');
        let repository =
            if is_official && !name.is_empty() { format!("library/{name}") } else { name.to_owned() };
        check_name(&repository, name)?;
        let tag = tag.or_else(|| digest.is_none().then(|| DEFAULT_TAG.to_owned()));
        Ok(Self { registry, repository, tag, digest })
    }
}

impl RegistryReference {
    /// What is asked for: the digest, else the tag.
    pub(crate) fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(formatter, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(formatter, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(formatter),
            Self::Layout { folder, tag: Some(tag) } => write!(formatter, "oci:{}:{tag}", folder.display()),
            Self::Layout { folder, tag: None } => write!(formatter, "oci:{}", folder.display()),
            Self::Archive { file } => write!(formatter, "docker-archive:{}", file.display()),
        }
    }
}

fn is_registry(first: &str) -> bool {
    first.contains(['.', ':', '[']) || first == "localhost"
}

fn registry(text: &str) -> Result<String, ReferenceError> {
    let bad = || ReferenceError::Registry(text.to_owned());
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or_else(bad)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            (format!("[{address}]"), port.strip_prefix(':').or(port.is_empty().then_some("")))
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host.to_owned(), Some(port).filter(|port| !port.is_empty())),
            None => (text.to_owned(), Some("")),
        },
    };
    let port = port.ok_or_else(bad)?;
    let is_label = |label: &str| {
        let ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        ends(label.bytes().next())
            && ends(label.bytes().last())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if !host.starts_with('[') && !host.split('.').all(is_label) {
        return Err(bad());
    }
    let host = host.to_ascii_lowercase();
    // Docker's own names for its registry.
    if matches!(host.as_str(), "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com") {
        return Ok(DEFAULT_REGISTRY.to_owned());
    }
    if port.is_empty() {
        return Ok(host);
    }
    match port.parse::<u16>() {
        Ok(port) if port > 0 => Ok(format!("{host}:{port}")),
        _ => Err(bad()),
    }
}

fn check_name(repository: &str, written: &str) -> Result<(), ReferenceError> {
    if written.bytes().any(|byte| byte.is_ascii_uppercase()) {
        let (name, lower) = (written.to_owned(), written.to_ascii_lowercase());
        return Err(ReferenceError::UpperCase { name, lower });
    }
    let is_alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_part = |part: &str| {
        let ends = |byte: Option<u8>| byte.is_some_and(is_alphanumeric);
        // Between letters and digits: `.`, `_`, `__` or any number of `-`.
        let between = part.split(|c: char| c.is_ascii_alphanumeric()).filter(|run| !run.is_empty());
        ends(part.bytes().next())
            && ends(part.bytes().last())
            && between
                .into_iter()
                .all(|run| matches!(run, "." | "_" | "__") || run.bytes().all(|byte| byte == b'-'))
    };
    if repository.len() <= NAME_BYTES && repository.split('/').all(is_part) {
        Ok(())
    } else {
        Err(ReferenceError::Name(written.to_owned()))
    }
}

fn checked_tag(tag: &str) -> Result<String, ReferenceError> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let begins = tag.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if begins && tag.len() <= TAG_BYTES && tag.bytes().all(fits) {
        Ok(tag.to_owned())
    } else {
        Err(ReferenceError::Tag(tag.to_owned()))
    }
}

fn layout(name: &str) -> Result<ImageReference, ReferenceError> {
    let (folder, tag) = match name.rsplit_once(':') {
        Some((folder, tag)) if !tag.contains('/') => (folder, Some(checked_tag(tag)?)),
        _ => (name, None),
    };
    Ok(ImageReference::Layout { folder: below(folder)?, tag })
}

/// A path that stays below the folder it is joined to.
fn below(name: &str) -> Result<PathBuf, ReferenceError> {
    if name.is_empty() {
        return Err(ReferenceError::Empty);
    }
    if name.chars().any(char::is_control) {
        return Err(ReferenceError::Characters(name.escape_default().to_string()));
    }
    let mut path = PathBuf::new();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            _ => return Err(ReferenceError::Outside(name.to_owned())),
        }
    }
    if path.as_os_str().is_empty() { Err(ReferenceError::Outside(name.to_owned())) } else { Ok(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_mean_what_everybody_expects() {
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("debian:bookworm", "docker.io/library/debian:bookworm".to_owned()),
            ("team/image", "docker.io/team/image:latest".to_owned()),
            ("docker.io/debian", "docker.io/library/debian:latest".to_owned()),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest".to_owned()),
            ("localhost/image", "localhost/image:latest".to_owned()),
            ("localhost:5000/image", "localhost:5000/image:latest".to_owned()),
            ("[::1]:5000/image:1", "[::1]:5000/image:1".to_owned()),
            ("Registry.Example.org/a/b/c:V1.2_x-y", "registry.example.org/a/b/c:V1.2_x-y".to_owned()),
            ("a__b/c--d.e_f", "docker.io/a__b/c--d.e_f:latest".to_owned()),
            (&format!("debian@{DIGEST}"), format!("docker.io/library/debian@{DIGEST}")),
            (
                &format!("registry.example.org:5000/team/image:tag@{DIGEST}"),
                format!("registry.example.org:5000/team/image:tag@{DIGEST}"),
            ),
            ("oci:images/base:1", "oci:images/base:1".to_owned()),
            ("oci:./base", "oci:base".to_owned()),
            ("docker-archive:base.tar", "docker-archive:base.tar".to_owned()),
        ] {
            let reference: ImageReference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(reference.to_string(), full);
            assert_eq!(full.parse::<ImageReference>().unwrap(), reference, "{text}");
        }
        assert!(format!("a:b@{DIGEST}").parse::<ImageReference>().unwrap().is_pinned());
        assert!(!"debian".parse::<ImageReference>().unwrap().is_pinned());
    }

    #[test]
    fn each_malformed_name_is_told() {
        let long = "a".repeat(300);
        for (text, part) in [
            ("", "needs a name"),
            ("oci:", "needs a name"),
            ("https://registry.example.org/a", "without `https://`"),
            ("a b", "spaces"),
            ("a\nb", "spaces"),
            ("bü", "spaces"),
            ("Debian:bookworm", "`debian`"),
            ("team/Image", "lower case"),
            ("a..b", "no image name"),
            ("a//b", "no image name"),
            ("/a", "no image name"),
            ("-a", "no image name"),
            ("a/", "no image name"),
            (":tag", "no image name"),
            ("../a", "no registry"),
            (&long, "no image name"),
            ("a:", "no tag"),
            ("a:-x", "no tag"),
            ("a:x/y", "no registry"),
            ("localhost:0/a", "no registry"),
            ("localhost:99999/a", "no registry"),
            ("ex..org/a", "no registry"),
            ("[::zz]/a", "no registry"),
            ("user:pass@host/a", "`host/a` is not a digest"),
            ("a@sha256:12", "not a digest"),
            ("a@md5:12", "not a digest"),
            ("oci:../x", "leads out"),
            ("oci:/etc", "leads out"),
            ("oci:a/../b", "leads out"),
            ("oci:.", "leads out"),
            ("oci:a:-", "no tag"),
            ("docker-archive:/x.tar", "leads out"),
            ("docker-archive:a/../../x.tar", "leads out"),
        ] {
            let error = text.parse::<ImageReference>().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_read_is_written_the_same(text in "[a-zA-Z0-9:/@._-]{0,40}") {
            if let Ok(reference) = text.parse::<ImageReference>() {
                proptest::prop_assert_eq!(reference.to_string().parse::<ImageReference>().unwrap(), reference);
            }
        }
    }
}
