//! Runs an installation whose every line is TLS, on an address that other machines reach where this machine has one.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Output;

use sealci_tests::{Certificates, Installation, Part, Repository, eventually, outward_address, skip};

const MANIFEST: &str = "name: tls
actions:
  first:
    configuration: {executor: process}
    commands: [cat version]
";

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_push_goes_through_services_that_meet_over_tls_only() {
    if outward_address().is_loopback() {
        skip(
            "network",
            "a_push_goes_through_services_that_meet_over_tls_only",
            "no address but loopback; it is used instead",
        );
    }
    let installation = Installation::start_behind_tls();
    for part in [Part::Scheduler, Part::Controller, Part::Monitor] {
        assert!(installation.url(part).starts_with("https://"), "{}", installation.url(part));
        // Who speaks without TLS gets no answer to a question.
        let address = installation.url(part).strip_prefix("https://").unwrap();
        let mut plain = TcpStream::connect(address).unwrap();
        plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut said = Vec::new();
        // It may be reset, too.
        let _ = plain.read_to_end(&mut said);
        assert!(!String::from_utf8_lossy(&said).contains("HTTP/1.1"), "{part:?}");
    }

    let repository = Repository::with_manifest(installation.scratch("repository"), MANIFEST);
    let added = installation.sealci(&["repo", "add", &repository.url(), "--poll", "1"]);
    assert!(added.status.success(), "{}", errors(&added));
    eventually("the monitor to look at the repository", || {
        installation.json(&["repo", "list"])[0]["last_poll"]["at"].as_str().map(|_| ())
    });
    repository.write("version", "sealed\n");
    let revision = repository.commit("Over TLS");
    let pipeline = eventually("the push's pipeline to finish", || {
        let page = installation.json(&["list", "--revision", &revision]);
        page["pipelines"].as_array()?.first().filter(|pipeline| pipeline["state"] == "finished").cloned()
    });
    assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
    let log = installation.sealci(&["logs", &pipeline["number"].to_string(), "first"]);
    assert_eq!(String::from_utf8_lossy(&log.stdout), "sealed\n");
}

#[test]
fn another_authority_is_refused_and_said_clearly() {
    let mut installation = Installation::start_behind_tls();
    let other = Certificates::make(&installation.scratch("other"), outward_address());
    let refused = installation.command(&["list"]).env("SEALCI_CA", &other.authority).output().unwrap();
    assert_eq!(refused.status.code(), Some(5), "{}", errors(&refused));
    assert!(errors(&refused).contains("certificate"), "{}", errors(&refused));
    // Without any, the system's are asked, and do not know ours.
    let refused = installation.command(&["list"]).env_remove("SEALCI_CA").output().unwrap();
    assert_eq!(refused.status.code(), Some(5), "{}", errors(&refused));

    fs::copy(&other.authority, installation.scratch("certificates/authority.pem")).unwrap();
    for part in [Part::Controller, Part::Agent] {
        installation.restart(part);
        eventually(&format!("the {part:?} to say what is wrong"), || {
            installation.service_log(part).contains("invalid peer certificate").then_some(())
        });
    }
}

#[test]
fn without_tls_only_this_machine_is_served() {
    let installation = Installation::none();
    let certificates = Certificates::make(&installation.scratch("certificates"), outward_address());
    let other = Certificates::make(&installation.scratch("other"), outward_address());
    for service in ["controller", "monitor", "scheduler"] {
        let refused = installation.sealci(&[service, "--listen", "0.0.0.0:0"]);
        assert_eq!(refused.status.code(), Some(2), "{}", errors(&refused));
        assert!(errors(&refused).contains("needs TLS"), "{}", errors(&refused));
        assert!(errors(&refused).contains("--tls-cert"), "{}", errors(&refused));

        let (certificate, key) = (certificates.certificate.display(), other.key.display());
        let (certificate, key) = (certificate.to_string(), key.to_string());
        let refused = installation.sealci(&[
            service,
            "--listen",
            "0.0.0.0:0",
            "--tls-cert",
            &certificate,
            "--tls-key",
            &key,
        ]);
        assert_eq!(refused.status.code(), Some(2), "{}", errors(&refused));
        assert!(errors(&refused).contains("cannot be used together"), "{}", errors(&refused));
    }
    for (service, flag) in
        [("controller", "--scheduler"), ("monitor", "--controller"), ("agent", "--scheduler")]
    {
        let refused = installation.sealci(&[service, flag, "http://192.0.2.1:8422"]);
        assert_eq!(refused.status.code(), Some(2), "{}", errors(&refused));
        assert!(errors(&refused).contains("unencrypted"), "{}", errors(&refused));
    }
}
