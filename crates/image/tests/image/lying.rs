//! Pulls from registries that break, hang and lie: what is right in the end is on disk, the rest is said.

use std::sync::Arc;
use std::time::Duration;

use sealci_image::{Credentials, Image, ImageError, ImageStore, PullPolicy, StoreOptions};
use serde_json::json;
use tokio::sync::Notify;

use crate::lab::*;
use crate::scripted::*;

const MIB: usize = 1 << 20;

fn large() -> MadeImage {
    image(&[(Archive::new().file("a", &noise(3 * MIB, 42)).bytes(), Packing::Plain)])
}

fn small(content: &str) -> MadeImage {
    image(&[(Archive::new().file("a", content.as_bytes()).bytes(), Packing::Gzip)])
}

fn impatient(mut options: StoreOptions) -> StoreOptions {
    options.timeouts.stall = Duration::from_millis(800);
    options
}

async fn served(image: &MadeImage) -> Scripted {
    let registry = Scripted::start().await;
    registry.serve("a", "1", image);
    registry
}

fn blob_requests(registry: &Scripted, layer: &Blob) -> Vec<Seen> {
    let suffix = layer.digest.to_string();
    registry.take_seen().into_iter().filter(|seen| seen.path.ends_with(&suffix)).collect()
}

#[tokio::test]
async fn what_breaks_off_goes_on_where_it_ended() {
    let made = large();
    let registry = served(&made).await;
    registry.faults([Fault::CloseAfter(0), Fault::CloseAfter(MIB), Fault::CloseAfter(MIB)]);
    // The configuration is the first blob that is asked for.
    let lab = Lab::new(registry.options());
    let image = obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    assert_eq!(std::fs::metadata(image.layers[0].join("a")).unwrap().len(), 3 * MIB as u64);
    let requests = blob_requests(&registry, &made.layers[0]);
    let ranges: Vec<_> = requests.iter().map(|seen| seen.range.clone()).collect();
    assert_eq!(ranges[0], None);
    assert!(ranges[1].as_ref().is_some_and(|range| range.starts_with("bytes=")), "{ranges:?}");
    // No byte of the layer came twice.
    let once = (made.layers[0].bytes.len() + made.config.bytes.len()) as u64;
    assert!(registry.sent_bytes() <= once + MIB as u64, "{} of {once}", registry.sent_bytes());
}

#[tokio::test]
async fn the_next_process_goes_on_with_what_is_there() {
    let made = large();
    let registry = served(&made).await;
    let mut options = impatient(registry.options());
    options.timeouts.retries = 0;
    let lab = Lab::new(options.clone());
    obtain(&lab.store, &registry.name("a:1")).await.ok();
    let lab = Lab::new(options);
    registry.faults([Fault::EndAfter(usize::MAX), Fault::HangAfter(2 * MIB)]);
    let error = obtain(&lab.store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::Hangs { .. }), "{error}");
    assert!(error.to_string().contains("no byte of layer 1 of 1"), "{error}");
    registry.take_seen();
    let again = ImageStore::open(&lab.path(), registry.options()).unwrap();
    obtain(&again, &registry.name("a:1")).await.unwrap();
    let requests = blob_requests(&registry, &made.layers[0]);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].range.as_deref(), Some(format!("bytes={}-", 2 * MIB).as_str()));
}

#[tokio::test]
async fn what_keeps_failing_is_told_after_some_tries() {
    let made = large();
    let registry = served(&made).await;
    let with_config = |fault: Fault| std::iter::once(Fault::EndAfter(usize::MAX)).chain(vec![fault; 20]);
    for (fault, part) in [
        (Fault::CloseAfter(10), "broke off layer 1 of 1"),
        (Fault::EndAfter(10), "are missing"),
        (Fault::HangAfter(10), "does not go on"),
        (Fault::NoAnswer, "does not go on"),
        (Fault::Status(503), "with 503"),
        (Fault::Status(429), "with 429"),
    ] {
        let lab = Lab::new(impatient(registry.options()));
        registry.faults(with_config(fault.clone()));
        registry.take_seen();
        let error = obtain(&lab.store, &registry.name("a:1")).await.unwrap_err();
        assert!(error.to_string().contains(part), "{fault:?}: {error}");
        assert!(error.is_passing(), "{fault:?}");
        assert_eq!(blob_requests(&registry, &made.layers[0]).len(), 4, "{fault:?}");
        registry.faults([]);
        obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    }
}

#[tokio::test]
async fn a_moment_of_trouble_is_overcome() {
    let made = large();
    let registry = served(&made).await;
    for fault in [Fault::Status(500), Fault::NoAnswer, Fault::Status(429)] {
        let lab = Lab::new(impatient(registry.options()));
        registry.faults([fault.clone(), fault.clone(), Fault::EndAfter(usize::MAX), fault.clone(), fault]);
        obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    }
}

#[tokio::test]
async fn wrong_bytes_are_never_used() {
    let made = large();
    let registry = served(&made).await;
    let mut wrong = made.layers[0].bytes.clone();
    wrong[5000] ^= 1;
    let mut long = made.layers[0].bytes.clone();
    long.push(0);
    for (fault, part) in [
        (Fault::Instead(wrong), "has the digest"),
        (Fault::Instead(long), "more than the"),
        (Fault::Status(404), "there is no image"),
        (Fault::Status(403), "refuses access"),
        (Fault::Status(418), "with 418"),
    ] {
        let lab = Lab::new(registry.options());
        registry.faults([Fault::EndAfter(usize::MAX), fault]);
        let error = obtain(&lab.store, &registry.name("a:1")).await.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(lab.names("layers"), Vec::<String>::new());
        obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    }
}

#[tokio::test]
async fn a_registry_that_answers_ranges_oddly_is_understood() {
    let made = large();
    let registry = served(&made).await;
    for fault in [Fault::IgnoreRange, Fault::WrongRange, Fault::Status(416)] {
        let lab = Lab::new(registry.options());
        registry.faults([Fault::EndAfter(usize::MAX), Fault::CloseAfter(MIB), fault]);
        obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    }
}

#[tokio::test]
async fn garbage_from_another_time_does_no_harm() {
    let made = large();
    let registry = served(&made).await;
    for garbage in [noise(MIB, 7), noise(9 * MIB, 7)] {
        let lab = Lab::new(registry.options());
        std::fs::write(lab.path().join("partial").join(made.layers[0].digest.hex()), garbage).unwrap();
        obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    }
}

#[tokio::test]
async fn a_manifest_has_to_be_what_its_digest_says() {
    let (made, other) = (small("right"), small("wrong"));
    let registry = served(&made).await;
    let lie = Blob { digest: made.manifest.digest.clone(), bytes: other.manifest.bytes.clone() };
    registry.serve_manifest("a", "2", &lie, MANIFEST_TYPE);
    let lab = Lab::new(registry.options());
    let name = format!("{}@{}", registry.name("a"), made.manifest.digest);
    let error = obtain(&lab.store, &name).await.unwrap_err();
    assert!(matches!(error, ImageError::WrongDigest { .. }), "{error}");
    let huge = Blob::new(vec![b' '; 5 << 20]);
    registry.serve_manifest("a", "huge", &huge, MANIFEST_TYPE);
    let error = obtain(&lab.store, &registry.name("a:huge")).await.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    let odd = Blob::json(&json!({"schemaVersion": 1}));
    registry.serve_manifest("a", "old", &odd, MANIFEST_TYPE);
    let error = obtain(&lab.store, &registry.name("a:old")).await.unwrap_err();
    assert!(error.to_string().contains("schema 1"), "{error}");
}

#[tokio::test]
async fn a_layer_has_to_be_what_the_configuration_says() {
    let archive = Archive::new().file("a", b"x").bytes();
    let layer = Blob::new(Packing::Gzip.pack(&archive));
    let other = sealci_image::Digest::of(b"other").to_string();
    let made = image_of(vec![layer], &[Packing::Gzip], &[other], this_architecture(), json!({}));
    let registry = served(&made).await;
    let lab = Lab::new(registry.options());
    let error = obtain(&lab.store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::CorruptLayer { .. }), "{error}");
    let made = image_of(made.layers, &[Packing::Gzip], &[], this_architecture(), json!({}));
    registry.serve("a", "2", &made);
    let error = obtain(&lab.store, &registry.name("a:2")).await.unwrap_err();
    assert!(error.to_string().contains("configuration names 0"), "{error}");
}

#[tokio::test]
async fn the_image_for_this_machine_is_chosen() {
    let registry = Scripted::start().await;
    let (own, other) = (small("own"), image_for(&[], "s390x", json!({})));
    let index = registry.serve_index("a", "1", &[("s390x", &other), (this_architecture(), &own)]);
    registry.serve_index("a", "2", &[("s390x", &other), ("riscv64", &other)]);
    registry.serve("a", "3", &other);
    let lab = Lab::new(registry.options());
    for name in ["a:1".to_owned(), format!("a@{index}")] {
        let image = obtain(&lab.store, &registry.name(&name)).await.unwrap();
        assert_eq!(
            (image.digest.clone(), read(&image, 0, "a")),
            (own.manifest.digest.to_string(), "own".into())
        );
    }
    for (name, there_is) in [("a:2", "there is linux/riscv64, linux/s390x"), ("a:3", "there is linux/s390x")]
    {
        let error = obtain(&lab.store, &registry.name(name)).await.unwrap_err();
        assert!(matches!(error, ImageError::Platform { .. }), "{error}");
        assert!(error.to_string().contains(there_is), "{error}");
    }
}

#[tokio::test]
async fn a_registry_is_asked_only_when_it_has_to_be() {
    let (first, second) = (small("first"), small("second"));
    let registry = served(&first).await;
    let lab = Lab::new(registry.options());
    let (tag, pinned) = (registry.name("a:1"), format!("{}@{}", registry.name("a"), first.manifest.digest));
    let ask = async |name: &str, pull| {
        let image: Result<Image, _> = obtain_noted(&lab.store, name, pull).await.0;
        let seen = registry.take_seen().iter().map(|seen| seen.method.clone()).collect::<Vec<_>>().join(" ");
        (image.map(|image| read(&image, 0, "a")).map_err(|error| error.to_string()), seen)
    };
    use PullPolicy::{Always, IfMissing, Never};
    let error = ask(&tag, Never).await;
    assert!(error.0.unwrap_err().contains("not on this machine") && error.1.is_empty());
    assert!(ask(&pinned, Never).await.0.is_err());
    let read = |text: &str, seen: &str| (Ok(text.to_owned()), seen.to_owned());
    assert_eq!(ask(&tag, IfMissing).await, read("first", "GET GET GET"));
    for (name, pull, seen) in [
        (&tag, IfMissing, ""),
        (&tag, Never, ""),
        (&tag, Always, "HEAD"),
        (&pinned, IfMissing, ""),
        (&pinned, Always, ""),
        (&pinned, Never, ""),
    ] {
        assert_eq!(ask(name, pull).await, read("first", seen), "{name} {pull:?}");
    }
    registry.serve("a", "1", &second);
    assert_eq!(ask(&tag, IfMissing).await, read("first", ""));
    assert_eq!(ask(&tag, Always).await, read("second", "HEAD GET GET GET"));
    assert_eq!(ask(&tag, IfMissing).await, read("second", ""));
    assert_eq!(ask(&pinned, Never).await, read("first", ""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_at_once_fetch_each_blob_once() {
    let base = Archive::new().file("base", &noise(MIB, 3)).bytes();
    let with = |text: &str| {
        let own = Archive::new().file("own", text.as_bytes()).bytes();
        image(&[(base.clone(), Packing::Zstd), (own, Packing::Gzip)])
    };
    let registry = Scripted::start().await;
    let (one, two) = (with("one"), with("two"));
    registry.serve("a", "1", &one);
    registry.serve("a", "2", &two);
    let lab = Lab::new(registry.options());
    let mut all = tokio::task::JoinSet::new();
    for index in 0..20 {
        let (store, name) = (lab.store.clone(), registry.name(&format!("a:{}", index % 2 + 1)));
        all.spawn(async move { obtain(&store, &name).await.unwrap() });
    }
    let images = all.join_all().await;
    assert_eq!(images.len(), 20);
    let seen = registry.take_seen();
    for layer in [&one.layers[0], &one.layers[1], &two.layers[1]] {
        let count = seen.iter().filter(|seen| seen.path.ends_with(&layer.digest.to_string())).count();
        assert_eq!(count, 1, "{seen:#?}");
    }
    assert_eq!(lab.names("layers").len(), 3);
}

#[tokio::test]
async fn who_leaves_does_not_take_the_work_away() {
    let made = large();
    let registry = served(&made).await;
    let go = Arc::new(Notify::new());
    registry.faults([Fault::EndAfter(usize::MAX), Fault::WaitAfter(MIB, go.clone())]);
    let lab = Lab::new(registry.options());
    let name = registry.name("a:1");
    let mut first = Box::pin(obtain(&lab.store, &name));
    tokio::select! {
        result = &mut first => panic!("{result:?}"),
        () = registry.reached.notified() => {}
    }
    // Once the second one says that it pulls, it waits for the same layer.
    let joined = Arc::new(Notify::new());
    let told = joined.clone();
    let notes = move |line: &str| {
        if line.starts_with("pulling") {
            told.notify_one();
        }
    };
    let wanted = wanted(&name, PullPolicy::IfMissing);
    let mut second = Box::pin(lab.store.obtain(&wanted, &notes));
    tokio::select! {
        result = &mut second => panic!("{result:?}"),
        () = joined.notified() => {}
    }
    drop(first);
    go.notify_one();
    second.await.unwrap();
    assert_eq!(blob_requests(&registry, &made.layers[0]).len(), 1);
}

#[tokio::test]
async fn tokens_are_fetched_with_and_without_a_login() {
    let made = small("x");
    let registry = served(&made).await;
    registry.guard(Guard { token: "secret-token", login: None });
    let lab = Lab::new(registry.options());
    obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    let seen = registry.take_seen();
    let count = |path: &str| seen.iter().filter(|seen| seen.path == path).count();
    assert_eq!((count("/token"), count("/v2/a/manifests/1")), (1, 2), "{seen:#?}");

    registry.guard(Guard { token: "secret-token", login: Some("Basic bWU6aHVudGVyMg==".to_owned()) });
    let lab = Lab::new(registry.options());
    let error = obtain(&lab.store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert!(error.to_string().contains("without a login"), "{error}");

    let login = |password: &str| {
        let mut options = registry.options();
        let auth =
            base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("me:{password}"));
        let text = json!({"auths": {registry.host.as_str(): {"auth": auth}}}).to_string();
        options.registries.credentials = Credentials::from_docker_config(&text).unwrap();
        Lab::new(options)
    };
    let error = obtain(&login("hunter3").store, &registry.name("a:1")).await.unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("does not take the login"), "{text}");
    assert!(!text.contains("hunter3") && !text.contains("aHVudGVyMw"), "{text}");
    let lab = login("hunter2");
    obtain(&lab.store, &registry.name("a:1")).await.unwrap();
}

#[tokio::test]
async fn a_helper_is_not_run() {
    let registry = served(&small("x")).await;
    registry.guard(Guard { token: "t", login: None });
    let mut options = registry.options();
    let text = json!({"credHelpers": {registry.host.as_str(): "evil"}}).to_string();
    options.registries.credentials = Credentials::from_docker_config(&text).unwrap();
    let error = obtain(&Lab::new(options).store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::CredentialHelper { .. }), "{error}");
    assert!(error.to_string().contains("docker-credential-evil"), "{error}");
}

#[tokio::test]
async fn a_redirect_gets_no_login_and_no_way_around_tls() {
    let made = small("x");
    let (registry, elsewhere) = (served(&made).await, Scripted::start().await);
    registry.guard(Guard { token: "secret-token", login: None });
    elsewhere.serve_blob("a", &made.layers[0]);
    let to = format!("http://{}/v2/a/blobs/{}?signature=open-sesame", elsewhere.host, made.layers[0].digest);
    registry.faults([Fault::EndAfter(usize::MAX), Fault::Redirect(to.clone())]);
    let error = obtain(&Lab::new(registry.options()).store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::Insecure { .. }), "{error}");
    assert!(error.to_string().contains(&elsewhere.host) && !error.to_string().contains("sesame"), "{error}");
    let mut options = registry.options();
    options.registries.insecure.insert(elsewhere.host.clone());
    registry.faults([Fault::EndAfter(usize::MAX), Fault::Redirect(to)]);
    obtain(&Lab::new(options.clone()).store, &registry.name("a:1")).await.unwrap();
    let seen = elsewhere.take_seen();
    assert_eq!((seen.len(), &seen[0].authorization), (1, &None), "{seen:?}");
    // In a circle.
    let round = format!("/v2/a/blobs/{}", made.layers[0].digest);
    registry.faults(std::iter::once(Fault::EndAfter(usize::MAX)).chain(vec![Fault::Redirect(round); 20]));
    let error = obtain(&Lab::new(options).store, &registry.name("a:1")).await.unwrap_err();
    assert!(error.to_string().contains("again and again"), "{error}");
}

#[tokio::test]
async fn mirrors_are_asked_first_and_may_fail() {
    let made = small("x");
    let (registry, mirror) = (served(&made).await, served(&made).await);
    let mut options = registry.options();
    options.registries.insecure.insert(mirror.host.clone());
    options.registries.mirrors.insert(registry.host.clone(), vec![mirror.host.clone()]);
    obtain(&Lab::new(options.clone()).store, &registry.name("a:1")).await.unwrap();
    assert_eq!((registry.take_seen().len(), mirror.take_seen().len()), (0, 3));
    let mut wrong = made.layers[0].bytes.clone();
    wrong[20] ^= 1;
    mirror.faults([Fault::Status(404), Fault::Instead(wrong)]);
    obtain(&Lab::new(options.clone()).store, &registry.name("a:1")).await.unwrap();
    assert!(registry.take_seen().len() == 2 && mirror.take_seen().len() == 3);
    options.registries.mirrors.insert(registry.host.clone(), vec!["127.0.0.1:1".into()]);
    obtain(&Lab::new(options).store, &registry.name("a:1")).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_reached_is_said() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_host = silent.local_addr().unwrap().to_string();
    let plain = Scripted::start().await;
    let mut options = impatient(options_for("127.0.0.1:1"));
    options.registries.insecure.insert(silent_host.clone());
    let lab = Lab::new(options);
    for (host, part) in [
        ("127.0.0.1:1", "cannot be reached (4 tries)"),
        (silent_host.as_str(), "does not go on: no byte of its manifest for 0.8 s (4 tries)"),
        ("nowhere.invalid", "cannot be reached (4 tries)"),
        (plain.host.as_str(), "is not encrypted"),
    ] {
        let error = obtain(&lab.store, &format!("{host}/a:1")).await.unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(host), "{error}");
    }
}

#[tokio::test]
async fn a_tag_whose_image_is_gone_everywhere_is_asked_for_anew() {
    let (first, second) = (small("first"), small("second"));
    let registry = served(&first).await;
    let lab = Lab::new(registry.options());
    drop(obtain(&lab.store, &registry.name("a:1")).await.unwrap());
    lab.store.close().await;
    // The layer is lost here and there.
    let layer = lab.names("layers").remove(0);
    std::fs::remove_dir_all(lab.path().join("layers").join(layer)).unwrap();
    registry.forget();
    registry.serve("a", "1", &second);
    let (image, notes) = obtain_noted(&lab.store, &registry.name("a:1"), PullPolicy::IfMissing).await;
    assert_eq!(read(&image.unwrap(), 0, "a"), "second");
    assert!(notes.iter().any(|note| note.contains("asking anew")), "{notes:?}");
    // A pinned one never becomes another.
    let pinned = format!("{}@{}", registry.name("a"), first.manifest.digest);
    let error = obtain(&lab.store, &pinned).await.unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let registry = served(&small("x")).await;
    registry.guard(Guard { token: "short", login: Some("long+lived".to_owned()) });
    let with = |token: &str| {
        let mut options = registry.options();
        let text =
            json!({"auths": {registry.host.as_str(): {"auth": "", "identitytoken": token}}}).to_string();
        options.registries.credentials = Credentials::from_docker_config(&text).unwrap();
        Lab::new(options)
    };
    let error = obtain(&with("another").store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    // A plus sign is a space in a form, unless it is written as `%2B`.
    registry.guard(Guard { token: "short", login: Some("long%2Blived".to_owned()) });
    obtain(&with("long+lived").store, &registry.name("a:1")).await.unwrap();
    let seen = registry.take_seen();
    let token = seen.iter().rfind(|seen| seen.path == "/token").unwrap();
    assert!(token.method == "POST" && token.body.contains("grant_type=refresh_token&"), "{token:?}");
    assert!(token.body.contains("scope=repository%3Aa%3Apull"), "{token:?}");
}

#[tokio::test]
async fn who_gives_up_while_it_is_unpacked_leaves_nothing() {
    let made = image(&[(Archive::new().file("a", &noise(60 * MIB, 9)).bytes(), Packing::Plain)]);
    let registry = served(&made).await;
    let lab = Lab::new(registry.options());
    let name = registry.name("a:1");
    let mut obtaining = Box::pin(obtain(&lab.store, &name));
    // Until it is being unpacked.
    let staged = async {
        while lab.names("staging").iter().all(|name| name.starts_with("file.")) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        result = &mut obtaining => drop(result.unwrap()),
        () = staged => drop(obtaining),
    }
    lab.store.close().await;
    assert_eq!(lab.names("staging"), Vec::<String>::new());
    let seen = blob_requests(&registry, &made.layers[0]).len();
    // What was fetched is still there.
    obtain(&lab.store, &name).await.unwrap();
    assert_eq!((seen, blob_requests(&registry, &made.layers[0]).len()), (1, 0));
}

#[tokio::test]
async fn who_sends_a_byte_now_and_then_is_given_up() {
    let made = large();
    let registry = served(&made).await;
    // The configuration first.
    registry.faults([
        Fault::CloseAfter(0),
        Fault::Crawl,
        Fault::Crawl,
        Fault::Crawl,
        Fault::Crawl,
        Fault::Crawl,
    ]);
    let mut options = registry.options();
    options.timeouts.crawl = Duration::from_millis(300);
    let lab = Lab::new(options);
    let error = obtain(&lab.store, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(&error, ImageError::Crawls { attempts: 4, .. }), "{error}");
    assert!(error.is_passing() && error.to_string().contains("crawls"), "{error}");
    // What it brought is not asked for again.
    registry.faults([]);
    registry.take_seen();
    obtain(&lab.store, &registry.name("a:1")).await.unwrap();
    let requests = blob_requests(&registry, &made.layers[0]);
    assert!(requests[0].range.is_some(), "{requests:?}");
}
