//! An agent that keeps things: it enrols with a key, claims, and goes to the controller's storage with its ticket.

use crypto_box::SecretKey;
use crypto_box::aead::OsRng;
use sealci_archive::ArchiveWriter;
use sealci_proto::agent::{AttemptRef, claim_answer, outcome};
use sealci_proto::scheduler::{EnrolQuestion, scheduler_message};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{AGENT, CLAIM, Line, REVISION, ScriptedAgent, World};

/// An agent that is enrolled, and the line to it.
pub struct Keeper {
    pub line: Line,
    key: SecretKey,
    pipelines: u32,
}

/// An attempt that runs.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub pipeline: String,
    pub of: AttemptRef,
    pub token: u64,
    pub url: String,
    pub ticket: String,
    /// Why it got neither.
    pub refused: String,
}

impl Keeper {
    pub async fn of(world: &World) -> Self {
        let key = SecretKey::generate(&mut OsRng);
        let line = world.line().await;
        let enrol = sealci_proto::agent::EnrolRequest {
            token: world.enrolment.expose().to_owned(),
            agent_id: AGENT.into(),
            name: "builder".into(),
            credential: vec![1; 32],
            public_key: key.public_key().as_bytes().to_vec(),
        };
        let question = EnrolQuestion { request: 1, enrol: Some(enrol) };
        line.say(scheduler_message::Body::EnrolQuestion(question)).await;
        Self { line, key, pipelines: 0 }
    }

    /// A pipeline of a repository, whose first action runs.
    pub async fn begin(&mut self, world: &World, repository: &str, manifest: &str) -> Attempt {
        self.pipelines += 1;
        let body = json!({
            "repo_url": repository, "ref": "refs/heads/main", "body": manifest,
            "revision": format!("{:08x}{}", self.pipelines, &REVISION[8..]),
        });
        let (status, made) = world.post("/api/v1/pipelines", body).await;
        assert_eq!(status, 201, "{made}");
        let of = self.line.queued().await;
        self.claimed(made["id"].as_str().unwrap(), of).await
    }

    /// Claims what waits.
    pub async fn claimed(&mut self, pipeline: &str, of: AttemptRef) -> Attempt {
        let claim_answer::Answer::Granted(granted) = self.line.claim(&of, CLAIM).await else {
            panic!("the claim was refused")
        };
        let storage = self.key.unseal(&granted.sealed_storage).unwrap();
        let storage: Value = serde_json::from_slice(&storage).unwrap();
        let text = |member: &str| storage[member].as_str().unwrap_or_default().to_owned();
        let (url, ticket, refused) = (text("url"), text("ticket"), text("refused"));
        Attempt { pipeline: pipeline.to_owned(), of, token: granted.token, url, ticket, refused }
    }

    /// Ends an attempt well, and waits until that is recorded.
    pub async fn succeed(&mut self, attempt: &Attempt) {
        let of = attempt.of.clone();
        ScriptedAgent { line: &mut self.line, attempt: of, token: attempt.token, sequence: 0 }
            .succeed()
            .await;
    }

    /// Ends an attempt otherwise.
    pub async fn fail(&mut self, attempt: &Attempt) {
        let of = attempt.of.clone();
        let mut agent =
            ScriptedAgent { line: &mut self.line, attempt: of, token: attempt.token, sequence: 0 };
        agent.running().await;
        agent
            .finished(outcome::Kind::Failed(outcome::Failed { exit_code: 1, limit: String::new() }), 0)
            .await;
        self.line.acknowledged(2, 0).await;
    }
}

/// An answer of the controller.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, bytes: response.bytes().await.unwrap_or_default().to_vec() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_default()
    }
}

impl Attempt {
    pub fn path(&self, rest: &str) -> String {
        format!("{}/api/v1/attempts/{}.{}{rest}", self.url, self.of.action_id, self.of.number)
    }

    pub async fn upload_as(&self, world: &World, digest: &str, bytes: &[u8]) -> Answer {
        let request = world.http.put(self.path(&format!("/blobs/{digest}"))).bearer_auth(&self.ticket);
        Answer::of(request.body(bytes.to_vec())).await
    }

    pub async fn upload(&self, world: &World, bytes: &[u8]) -> Answer {
        self.upload_as(world, &digest(bytes), bytes).await
    }

    pub async fn post(&self, world: &World, rest: &str, body: Value) -> Answer {
        Answer::of(world.http.post(self.path(rest)).bearer_auth(&self.ticket).json(&body)).await
    }

    pub async fn get(&self, world: &World, rest: &str) -> Answer {
        Answer::of(world.http.get(self.path(rest)).bearer_auth(&self.ticket)).await
    }

    /// Uploads an archive and keeps it; the artifact.
    pub async fn keep(&self, world: &World, packed: &Packed) -> Answer {
        assert!(matches!(self.upload(world, &packed.bytes).await.status, 200 | 201));
        self.post(world, "/artifacts", packed.artifact()).await
    }

    /// Uploads bytes and keeps them under a cache's key; whether they are.
    pub async fn keep_cache(&self, world: &World, key: &str, bytes: &[u8]) -> Answer {
        assert!(matches!(self.upload(world, bytes).await.status, 200 | 201));
        let body = json!({"key": key, "digest": digest(bytes), "unpacked_bytes": 1, "files": 1});
        self.post(world, "/caches", body).await
    }

    /// What is found for a key: its key, and whether it is the one asked for.
    pub async fn find(&self, world: &World, key: &str, restore: &[&str]) -> Option<(String, bool)> {
        let found = self.post(world, "/caches/find", json!({"key": key, "restore": restore})).await;
        assert_eq!(found.status, 200, "{:?}", found.json());
        let entry = found.json()["entry"].clone();
        Some((entry["key"].as_str()?.to_owned(), entry["exact"].as_bool()?))
    }
}

pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// An archive.
#[derive(Debug, Clone)]
pub struct Packed {
    pub bytes: Vec<u8>,
    pub files: usize,
    pub unpacked: u64,
}

impl Packed {
    /// Of files; those that are large begin frames of their own.
    pub fn of(files: &[(&str, &[u8])]) -> Self {
        let mut writer = ArchiveWriter::new(Vec::new()).unwrap();
        let mut tar = tar::Builder::new(&mut writer);
        for (path, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, *bytes).unwrap();
        }
        tar.finish().unwrap();
        drop(tar);
        let (bytes, summary) = writer.finish().unwrap();
        Self { bytes, files: files.len(), unpacked: summary.unpacked_bytes }
    }

    pub fn artifact(&self) -> Value {
        let (files, unpacked_bytes) = (self.files, self.unpacked);
        json!({"kind": "files", "digest": digest(&self.bytes), "files": files, "unpacked_bytes": unpacked_bytes})
    }
}
