//! Makes certificates for tests: an authority and what it signed, as files.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// PEM files: an authority of its own, and a certificate for one address with its key.
#[derive(Debug, Clone)]
pub struct Certificates {
    pub authority: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Certificates {
    /// Makes all three in the folder.
    pub fn make(folder: &Path, address: IpAddr) -> Self {
        fs::create_dir_all(folder).expect("a folder can be made");
        let write = |name: &str, pem: String| {
            let path = folder.join(name);
            fs::write(&path, pem).expect("a certificate can be written");
            path
        };
        let authority_key = KeyPair::generate().expect("a key can be made");
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = parameters.self_signed(&authority_key).expect("a key can sign");
        let issuer = Issuer::new(parameters, authority_key);
        let key = KeyPair::generate().expect("a key can be made");
        let leaf = CertificateParams::new(vec![address.to_string()]).expect("an address is a name");
        let leaf = leaf.signed_by(&key, &issuer).expect("an authority can sign");
        Self {
            authority: write("authority.pem", authority.pem()),
            certificate: write("certificate.pem", leaf.pem()),
            key: write("key.pem", key.serialize_pem()),
        }
    }
}

/// The address of this machine that other machines reach; loopback where it has none.
pub fn outward_address() -> IpAddr {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    // Nothing is sent: connecting a datagram socket only asks which way a datagram would leave.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok();
    let outward = socket.and_then(|socket| {
        socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9)).ok()?;
        socket.local_addr().ok()
    });
    outward.map_or(loopback, |address| address.ip())
}
