//! Reads what TLS stands on from PEM files: a service's certificate with its key, and the authority that a client trusts.
//!
//! Invariants:
//! - what is read is checked at once: that the key fits the certificate is known before a port is open;
//! - a key is never shown, in errors neither.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// What a service speaks behind TLS, the preferred first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Makes aws-lc-rs what every TLS connection of this process uses, unless something was chosen before. Clients cannot be
/// built without; calling it again changes nothing.
pub fn choose_provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// Why a certificate, key or authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} holds no certificate: it should be PEM, with `-----BEGIN CERTIFICATE-----`", path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} is no valid PEM", path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{} holds no private key that can be used: it should be PEM, unencrypted, with `-----BEGIN PRIVATE KEY-----`", path.display())]
    NoKey { path: PathBuf },
    #[error("the certificate {} and the key {} cannot be used together", certificate.display(), key.display())]
    Unfit { certificate: PathBuf, key: PathBuf, source: rustls::Error },
}

/// Who a service is: its certificates, its own first, and the key of that. `Debug` does not show the key.
#[derive(Clone)]
pub struct Identity {
    certificates_pem: Vec<u8>,
    key_pem: Vec<u8>,
    config: Arc<ServerConfig>,
}

impl Identity {
    /// Reads both files, and checks that they fit.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let (certificates_pem, certificates) = read_certificates(certificate)?;
        let key_pem = read(key)?;
        let key_der =
            PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_| TlsError::NoKey { path: key.to_owned() })?;
        let unfit =
            |source| TlsError::Unfit { certificate: certificate.to_owned(), key: key.to_owned(), source };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unfit)?
            .with_no_client_auth()
            .with_single_cert(certificates, key_der)
            .map_err(unfit)?;
        config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
        Ok(Self { certificates_pem, key_pem, config: Arc::new(config) })
    }

    /// For a listener of ours.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// For a server that makes its own configuration, like tonic's.
    pub fn certificates_pem(&self) -> &[u8] {
        &self.certificates_pem
    }

    pub fn key_pem(&self) -> &[u8] {
        &self.key_pem
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(***)")
    }
}

/// Reads the authority that clients are to trust: one certificate or several, as PEM.
pub fn read_authority(path: &Path) -> Result<Vec<u8>, TlsError> {
    read_certificates(path).map(|(pem, _)| pem)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn read_certificates(path: &Path) -> Result<(Vec<u8>, Vec<CertificateDer<'static>>), TlsError> {
    let pem = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|source| TlsError::Pem { path: path.to_owned(), source })?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate { path: path.to_owned() });
    }
    Ok((pem, certificates))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_with_the_files_name() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let made = |name: &str| rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let (one, other) = (made("one.test"), made("other.test"));
        let certificate = write("one.crt", &one.cert.pem());
        let key = write("one.key", &one.signing_key.serialize_pem());
        let other_key = write("other.key", &other.signing_key.serialize_pem());
        let nothing = write("nothing", "nothing\n");

        let identity = Identity::from_files(&certificate, &key).unwrap();
        assert_eq!(format!("{identity:?}"), "Identity(***)");
        assert!(read_authority(&certificate).is_ok());

        let refused = |certificate: &Path, key: &Path| {
            let error = Identity::from_files(certificate, key).unwrap_err();
            (crate::problem::chain(&error), error)
        };
        let (text, error) = refused(&certificate, &other_key);
        assert!(matches!(error, TlsError::Unfit { .. }), "{text}");
        assert!(text.contains("one.crt") && text.contains("other.key"), "{text}");
        assert!(matches!(refused(&nothing, &key).1, TlsError::NoCertificate { .. }));
        assert!(matches!(refused(&certificate, &certificate).1, TlsError::NoKey { .. }));
        assert!(matches!(refused(&certificate, &folder.path().join("none")).1, TlsError::Read { .. }));
        assert!(read_authority(&key).is_err());
    }
}
