//! The listener behind TLS.

use std::time::Duration;

use sealci_proto::agent::EnrolRequest;
use sealci_proto::agent::agent_service_client::AgentServiceClient;
use sealci_scheduler::Tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Error};

use crate::peers::{Scheduler, config, soon};

/// What the scheduler shows, and the authority that signed it, as PEM.
fn certified() -> (Tls, String) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::default();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = parameters.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let tls =
        Tls { certificates_pem: leaf.pem().into_bytes(), key_pem: key.serialize_pem().into_bytes().into() };
    (tls, authority.pem())
}

async fn connect(scheduler: &Scheduler, authority: &str) -> Result<Channel, Error> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority));
    let endpoint = Endpoint::from_shared(format!("https://{}", scheduler.address)).unwrap();
    endpoint.tls_config(tls).unwrap().connect().await
}

/// Asks something that is answered without a controller.
async fn is_served(scheduler: &Scheduler, authority: &str) {
    let channel = soon("a connection", connect(scheduler, authority)).await.unwrap();
    let refused = AgentServiceClient::new(channel).enrol(EnrolRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}

async fn start() -> (Scheduler, String) {
    let (tls, authority) = certified();
    let mut config = config();
    config.tls = Some(tls);
    config.handshake_timeout = Duration::from_millis(300);
    (Scheduler::start(config).await, authority)
}

#[tokio::test]
async fn who_trusts_the_authority_is_served_and_no_other() {
    let (scheduler, authority) = start().await;
    is_served(&scheduler, &authority).await;
    let (_, stranger) = certified();
    let error = connect(&scheduler, &stranger).await.unwrap_err();
    let cause = format!("{error:?}");
    assert!(cause.contains("UnknownIssuer") || cause.contains("BadSignature"), "{cause}");
    let plain = Endpoint::from_shared(format!("http://{}", scheduler.address)).unwrap();
    let mut plain = AgentServiceClient::new(plain.connect_lazy());
    let unanswered = soon("the end of a plain call", plain.enrol(EnrolRequest::default())).await;
    assert!(!unanswered.unwrap_err().message().contains("controller"));
    scheduler.stop().await;
}

#[tokio::test]
async fn garbage_and_slow_handshakes_hurt_nobody_else() {
    let (scheduler, authority) = start().await;
    let mut silent = TcpStream::connect(scheduler.address).await.unwrap();
    let mut slow = TcpStream::connect(scheduler.address).await.unwrap();
    slow.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.unwrap();
    let mut garbage = TcpStream::connect(scheduler.address).await.unwrap();
    garbage.write_all(&[0xff; 5000]).await.unwrap();
    is_served(&scheduler, &authority).await;
    for stream in [&mut silent, &mut slow, &mut garbage] {
        // An error is an end as well.
        let _ = soon("the end of what is no handshake", stream.read_to_end(&mut Vec::new())).await;
    }
    scheduler.stop().await;
}
