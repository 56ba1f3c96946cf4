//! Follows logs through real gRPC and real HTTP to their end, and to the end of those that have none.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use futures_util::StreamExt;
use sealci_proto::agent::{AttemptRef, Claim, LogChunk, outcome};
use sealci_proto::scheduler::{controller_message, from_agent, to_agent};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MANIFEST: &str = "name: logs\nactions:\n  one:\n    commands: [echo a]\n";

#[tokio::test]
async fn followers_see_a_log_grow_and_end() {
    let (_folder, database) = sqlite();
    let world = World::on(database, Duration::from_secs(600)).await;
    let mut line = world.line().await;
    world.create(MANIFEST).await;
    let one = line.queued().await;
    let mut agent = line.granted(&one).await;
    agent.running().await;
    agent.line.acknowledged(1, 0).await;
    let follow = format!("{}/api/v1/actions/{}/attempts/1/log/follow", world.url, one.action_id);
    let response = world.http.get(follow).bearer_auth(world.token.expose()).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut events = response.bytes_stream();
    let mut text = String::new();
    for (offset, part) in [(0, "abc"), (3, "def")] {
        agent.log(offset, part.as_bytes()).await;
        let expected = format!("id: {}", offset + 3);
        while !text.contains(&expected) {
            text.push_str(&String::from_utf8_lossy(&within(events.next()).await.unwrap().unwrap()));
        }
    }
    agent.finished(outcome::Kind::Failed(outcome::Failed { exit_code: 7, limit: String::new() }), 6).await;
    while let Some(part) = within(events.next()).await {
        text.push_str(&String::from_utf8_lossy(&part.unwrap()));
    }
    assert!(text.contains("event: end") && text.contains("\"length\":6"), "{text}");
}

#[tokio::test]
async fn a_log_that_nobody_delivers_to_its_end_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let mut world = World::on(database, Duration::from_millis(300)).await;
        world.crash().await;
        world.config.close_logs_after = Duration::from_millis(100);
        world.start().await;
        let mut line = world.standing_line().await;
        world.create(MANIFEST).await;
        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        let token = agent.token;
        agent.running().await;
        agent.log(0, b"abc").await;
        // One that finishes, and owes the rest of its log.
        assert_eq!(line.queued().await.number, 2, "the first is lost");
        let two = AttemptRef { number: 2, ..one.clone() };
        let mut agent = line.granted(&two).await;
        agent.running().await;
        agent
            .finished(outcome::Kind::Failed(outcome::Failed { exit_code: 1, limit: String::new() }), 9)
            .await;

        let followed = |number: u32| {
            let follow =
                format!("{}/api/v1/actions/{}/attempts/{number}/log/follow", world.url, one.action_id);
            let asked = world.http.get(follow).bearer_auth(world.token.expose()).send();
            async move { within(async { asked.await.unwrap().text().await.unwrap() }).await }
        };
        let lost = followed(1).await;
        assert!(lost.contains("event: gap") && lost.contains(r#""to":3"#), "{lost}");
        assert!(lost.contains("event: end") && lost.contains(r#""length":3"#), "{lost}");
        let cut = followed(2).await;
        assert!(cut.contains(r#""to":9"#) && cut.contains(r#""length":9"#), "{cut}");
        let log = format!("{}/api/v1/actions/{}/attempts/1/log", world.url, one.action_id);
        let whole = world.http.get(log).bearer_auth(world.token.expose()).send().await.unwrap();
        assert_eq!(whole.headers()["sealci-log-complete"], "true");
        let whole = whole.text().await.unwrap();
        assert!(whole.starts_with("abc\n[SealCI: the rest of this log is missing:"), "{whole}");

        // Its agent comes back all the same: nothing more is wanted of it.
        let mut zombie = ScriptedAgent { line: &mut line, attempt: one.clone(), token, sequence: 1 };
        zombie.log(3, b"late").await;
        let closed = |body| match to_agent_body(body)? {
            to_agent::Body::Ack(ack) => (ack.closed && ack.attempt.as_ref() == Some(&one)).then_some(ack),
            _ => None,
        };
        assert!(line.until(closed).await.fenced);
    }
}

#[tokio::test]
async fn a_chunk_past_the_contracts_bound_is_left_out_and_the_log_stays_readable() {
    const MOST: usize = sealci_proto::MAX_LOG_CHUNK_BYTES;
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, Duration::from_secs(600)).await;
        let mut line = world.line().await;
        world.create(MANIFEST).await;
        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        agent.running().await;
        agent.log(0, &vec![b'x'; 3 << 20]).await;
        agent.log(0, &vec![b'x'; MOST + 1]).await;
        // Were one of them taken, this would be known already.
        agent.log(0, &vec![b'y'; MOST]).await;
        let ack = agent.line.acknowledged(1, MOST as u64).await;
        assert_eq!(ack.next_offset, MOST as u64);
        agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), MOST as u64).await;
        agent.line.acknowledged(2, MOST as u64).await;
        let log = format!("{}/api/v1/actions/{}/attempts/1/log", world.url, one.action_id);
        let read = world.http.get(log).bearer_auth(world.token.expose()).send().await.unwrap();
        assert_eq!(read.status(), 200);
        let bytes = read.bytes().await.unwrap();
        assert!(bytes.len() == MOST && bytes.iter().all(|byte| *byte == b'y'), "{} bytes", bytes.len());
    }
}

/// The most memory that this process has had so far.
fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Ten who follow a log and read one byte of it: neither the action nor another reader waits for them, and what they have not read
/// is not kept in memory.
#[tokio::test(flavor = "multi_thread")]
async fn followers_that_hardly_read_hold_up_nobody() {
    const PIECE: u64 = 1 << 20;
    const PIECES: u64 = 48;
    const SLOW: usize = 10;
    let (_folder, database) = sqlite();
    let world = World::on(database, Duration::from_secs(600)).await;
    let mut line = world.line().await;
    world.create(MANIFEST).await;
    let one = line.queued().await;
    let mut agent = line.granted(&one).await;
    agent.running().await;
    agent.line.acknowledged(1, 0).await;
    agent.log(0, &vec![b'x'; PIECE as usize]).await;
    agent.line.acknowledged(1, PIECE).await;

    let path = format!("/api/v1/actions/{}/attempts/1/log/follow", one.action_id);
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        let mut stream = TcpStream::connect(world.url.trim_start_matches("http://")).await.unwrap();
        let token = world.token.expose();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        within(stream.read_exact(&mut [0])).await.unwrap();
        slow.push(stream);
    }
    let request = world.http.get(format!("{}{path}", world.url)).bearer_auth(world.token.expose());
    let mut events = request.send().await.unwrap().bytes_stream();
    let reading = tokio::spawn(async move {
        let mut read_bytes = 0;
        while let Some(part) = events.next().await {
            read_bytes += part.unwrap().len() as u64;
        }
        read_bytes
    });
    let before = peak_memory_bytes();
    for piece in 1..PIECES {
        agent.log(piece * PIECE, &vec![b'x'; PIECE as usize]).await;
        agent.line.acknowledged(1, (piece + 1) * PIECE).await;
    }
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), PIECES * PIECE).await;
    agent.line.acknowledged(2, PIECES * PIECE).await;
    let read_bytes = tokio::time::timeout(Duration::from_secs(60), reading).await.unwrap().unwrap();
    assert!(read_bytes > PIECES * PIECE, "another reader has all of it");
    let grown = peak_memory_bytes() - before;
    println!("{SLOW} slow followers of {PIECES} MiB: memory grew by {} MiB", grown >> 20);
    assert!(grown < SLOW as u64 * PIECES * PIECE / 4, "what is not read is not kept: {grown}");
    // Who reads on at last finds everything.
    let mut rest = slow.swap_remove(0);
    let (mut part, mut read_bytes, mut tail) = (vec![0; 1 << 20], 0_u64, Vec::new());
    while !tail.windows(10).any(|window| window == b"event: end") {
        let count = within(rest.read(&mut part)).await.unwrap();
        assert!(count > 0, "the stream ended without its end");
        read_bytes += count as u64;
        tail.extend_from_slice(&part[..count]);
        tail.drain(..tail.len().saturating_sub(4096));
    }
    assert!(read_bytes > PIECES * PIECE);
}

/// An attempt may owe the rest of its log when the next one is claimed: both may come at once, in one commit.
#[tokio::test]
async fn an_attempts_last_words_may_come_with_its_successors_claim() {
    const ACTIONS: usize = 40;
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, Duration::from_secs(600)).await;
        let mut line = world.line().await;
        let actions: String =
            (0..ACTIONS).map(|n| format!("  a{n}: {{needs: [], commands: [x]}}\n")).collect();
        world.create(&format!("name: logs\nactions:\n{actions}")).await;
        let wants = |body| match body {
            controller_message::Body::Wants(wants) if wants.attempts.len() == ACTIONS => Some(wants.attempts),
            _ => None,
        };
        let firsts: Vec<AttemptRef> =
            line.until(wants).await.into_iter().filter_map(|want| want.attempt).collect();
        let mut tokens = Vec::new();
        for first in &firsts {
            let mut agent = line.granted(first).await;
            agent.running().await;
            let (cause, message) = ("agent_restarted".into(), String::new());
            agent.finished(outcome::Kind::Errored(outcome::Errored { cause, message }), 4).await;
            tokens.push(agent.token);
            let next = line.queued().await;
            assert_eq!((&next.action_id, next.number), (&first.action_id, 2));
        }
        for (first, token) in firsts.iter().zip(tokens) {
            let attempt = Some(first.clone());
            let data = bytes::Bytes::from_static(b"last");
            line.forward(from_agent::Body::LogChunk(LogChunk { attempt, token, offset: 0, data, gap: None }))
                .await;
            let attempt = Some(AttemptRef { number: 2, ..first.clone() });
            line.forward(from_agent::Body::Claim(Claim { attempt, claim_id: CLAIM.into() })).await;
        }
        for first in &firsts {
            line.until(|body| match to_agent_body(body)? {
                to_agent::Body::Ack(ack) => {
                    (ack.attempt.as_ref() == Some(first) && ack.next_offset == 4).then_some(())
                }
                _ => None,
            })
            .await;
            let path = format!("/api/v1/actions/{}/attempts/1/log", first.action_id);
            assert_eq!(world.get(&path).await, "last");
        }
    }
}
