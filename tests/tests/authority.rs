//! Builds a repository on an https server whose certificate is of an authority that only its owner knows.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};

use sealci_git::testing::SmartHttp;
use sealci_service::tls::{Identity, choose_provider};
use sealci_tests::{Certificates, Installation, Part, Repository, eventually};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

const MANIFEST: &str = "name: own authority
actions:
  first:
    configuration: {executor: process}
    commands: [cat version]
";

/// Puts TLS in front of a server on this machine, for as long as the runtime lives; gives its address.
async fn behind_tls(plain: &str, certificates: &Certificates) -> String {
    let identity = Identity::from_files(&certificates.certificate, &certificates.key).unwrap();
    let acceptor = TlsAcceptor::from(identity.server_config());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let plain = plain.strip_prefix("http://").unwrap().to_owned();
    tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, plain) = (acceptor.clone(), plain.clone());
            connections.spawn(async move {
                // Who does not trust the certificate goes away again.
                let Ok(mut outer) = acceptor.accept(stream).await else { return };
                let mut inner = TcpStream::connect(plain).await.unwrap();
                let _ = copy_bidirectional(&mut outer, &mut inner).await;
            });
        }
    });
    url
}

#[test]
fn a_repository_is_built_whose_authority_was_named_and_else_refused() {
    choose_provider();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut installation = Installation::none();
    let certificates =
        Certificates::make(&installation.scratch("certificates"), IpAddr::V4(Ipv4Addr::LOCALHOST));
    let bare = installation.scratch("served/project.git");
    let repository = Repository::with_manifest(installation.scratch("work"), MANIFEST);
    repository.git(&["init", "--quiet", "--bare", "--initial-branch=main", &bare.display().to_string()]);
    let push = || repository.git(&["push", "--quiet", &bare.display().to_string(), "main"]);
    push();
    let server = runtime.block_on(SmartHttp::start(installation.scratch("served"), None)).unwrap();
    let url = runtime.block_on(behind_tls(&server.url, &certificates)) + "/project.git";

    installation.start_all();
    let added = installation.sealci(&["repo", "add", &url, "--poll", "1"]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    let said = eventually("the monitor to say what is wrong", || {
        installation.json(&["repo", "list"])[0]["last_poll"]["error"].as_str().map(str::to_owned)
    });
    assert!(said.contains("of no trusted authority") && said.contains("--git-ca"), "{said}");

    for part in [Part::Controller, Part::Monitor, Part::Agent] {
        let arguments = ["--git-ca".to_owned(), certificates.authority.display().to_string()];
        installation.arguments.entry(part).or_default().extend(arguments);
        installation.restart(part);
    }
    eventually("the monitor to look at the repository", || {
        let poll = &installation.json(&["repo", "list"])[0]["last_poll"];
        (poll["at"].is_string() && poll["error"].is_null()).then_some(())
    });
    repository.write("version", "trusted\n");
    let revision = repository.commit("Over TLS");
    push();
    let pipeline = eventually("the push's pipeline to finish", || {
        let page = installation.json(&["list", "--revision", &revision]);
        page["pipelines"].as_array()?.first().filter(|pipeline| pipeline["state"] == "finished").cloned()
    });
    assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
    let log = installation.sealci(&["logs", &pipeline["number"].to_string(), "first"]);
    assert_eq!(String::from_utf8_lossy(&log.stdout), "trusted\n");
}
