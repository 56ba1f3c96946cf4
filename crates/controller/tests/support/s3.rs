//! A real S3 server: moto's.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sealci_controller::storage::objects::ObjectsConfig;
use sealci_service::testing::skipped;

const BUCKET: &str = "sealci";

pub struct Server {
    pub url: String,
    process: Child,
    http: reqwest::Client,
}

pub fn config(url: &str) -> ObjectsConfig {
    let variables = [
        ("AWS_ENDPOINT", url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    let aws = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    ObjectsConfig { location: format!("s3://{BUCKET}/some/prefix").parse().unwrap(), aws }
}

impl Server {
    /// None, loudly, where there is none to start.
    pub async fn start() -> Option<Self> {
        let program = std::env::var("SEALCI_TEST_S3").unwrap_or_else(|_| "moto_server".into());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(&program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let Ok(process) = process else {
            skipped("an S3 server as the object store", &format!("`{program}` is not installed"));
            return None;
        };
        let url = format!("http://127.0.0.1:{port}");
        let server = Self { url, process, http: reqwest::Client::new() };
        let bucket = format!("{}/{BUCKET}", server.url);
        let ready = async {
            while !server.http.put(&bucket).send().await.is_ok_and(|answer| answer.status().is_success()) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), ready).await.expect("the S3 server does not start");
        Some(server)
    }

    async fn listed(&self, query: &str, element: &str) -> usize {
        let answer = self.http.get(format!("{}/{BUCKET}?{query}", self.url)).send().await.unwrap();
        answer.text().await.unwrap().matches(element).count()
    }

    pub async fn objects(&self) -> usize {
        self.listed("list-type=2", "<Key>").await
    }

    pub async fn unfinished_uploads(&self) -> usize {
        self.listed("uploads", "<UploadId>").await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
