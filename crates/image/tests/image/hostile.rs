//! Unpacks layers that nobody honest makes: each is refused with its reason or does no harm, and the store stays sound.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use sealci_image::{ImageError, StoreOptions, UnpackLimits};
use tar::EntryType;
use tempfile::TempDir;

use crate::lab::*;

const LAYER_BYTES: u64 = 8 << 20;
const ENTRIES: u64 = 200;
const DEPTH: usize = 20;

enum Then {
    /// The error says this.
    Refused(&'static str),
    /// It is unpacked, and this holds for its folder.
    Harmless(fn(&Path)),
}
use Then::{Harmless, Refused};

struct Attack {
    name: &'static str,
    layer: Vec<u8>,
    then: Then,
}

fn attack(name: &'static str, archive: Archive, then: Then) -> Attack {
    Attack { name, layer: archive.bytes(), then }
}

fn text(root: &Path, path: &str) -> String {
    std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn is_missing(root: &Path, path: &str) {
    let there = std::fs::symlink_metadata(root.join(path));
    assert!(there.is_err(), "{path}: {there:?}");
}

fn is_whiteout(root: &Path, path: &str) {
    let there = std::fs::symlink_metadata(root.join(path)).unwrap();
    assert!(there.file_type().is_char_device() && there.rdev() == 0, "{path}: {there:?}");
}

fn mode(root: &Path, path: &str) -> u32 {
    std::fs::symlink_metadata(root.join(path)).unwrap().permissions().mode() & 0o7777
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(100);
    rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value)).ok()?;
    Some(value)
}

fn is_opaque(root: &Path, path: &str) -> bool {
    attribute(&root.join(path), "user.overlay.opaque").as_deref() == Some(b"y")
}

/// The canary is a file beside everything, by its absolute path.
fn ways_out(canary: &str) -> Vec<Attack> {
    let folder = Path::new(canary).parent().unwrap().to_str().unwrap();
    let name = Path::new(canary).file_name().unwrap().to_str().unwrap();
    let up = format!("{}{}", "../".repeat(30), &canary[1..]);
    vec![
        attack(
            "an absolute path stays inside",
            Archive::new().file("/etc/passwd", b"evil"),
            Harmless(|root| {
                assert_eq!(text(root, "etc/passwd"), "evil");
            }),
        ),
        attack(
            "many slashes are one",
            Archive::new().file("//a///b", b"x"),
            Harmless(|root| {
                assert_eq!(text(root, "a/b"), "x");
            }),
        ),
        attack("`..` at the beginning", Archive::new().file("../x", b"evil"), Refused("`..`")),
        attack("`..` in the middle", Archive::new().file("a/../../x", b"evil"), Refused("`..`")),
        attack("`..` after a slash", Archive::new().file("/../x", b"evil"), Refused("`..`")),
        attack("`..` as a folder", Archive::new().folder(".."), Refused("`..`")),
        attack(
            "`..` in a pax path",
            Archive::new().pax(&[("path", up.as_bytes())]).file("a", b"evil"),
            Refused("`..`"),
        ),
        attack(
            "a zero byte in a pax path",
            Archive::new().pax(&[("path", b"a\0/../b")]).file("a", b""),
            Refused("zero byte"),
        ),
        attack(
            "a zero byte in a name",
            Archive::new().pax(&[("path", b"a\0b")]).file("a", b""),
            Refused("zero byte"),
        ),
        attack(
            "writing through an absolute link",
            Archive::new().symlink("out", folder).file(&format!("out/{name}"), b"evil"),
            Refused("leads nowhere"),
        ),
        attack(
            "writing through a link upwards",
            Archive::new().symlink("out", "../../../../../..").file("out/etc/evil", b"evil"),
            Harmless(|root| assert_eq!(text(root, "etc/evil"), "evil")),
        ),
        attack(
            "writing through links to links",
            Archive::new().symlink("a", "b").symlink("b", "/").file("a/etc/evil", b"evil"),
            Harmless(|root| assert_eq!(text(root, "etc/evil"), "evil")),
        ),
        attack(
            "links in a circle",
            Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", b""),
            Refused("cannot be written"),
        ),
        attack(
            "a file over a link replaces the link",
            Archive::new().symlink("out", canary).file("out", b"evil"),
            Harmless(|root| {
                assert_eq!(text(root, "out"), "evil");
                assert!(!root.join("out").is_symlink());
            }),
        ),
        attack(
            "a folder over a link replaces the link",
            Archive::new().symlink("out", folder).folder("out/").file(&format!("out/{name}"), b"evil"),
            Harmless(|root| assert!(!root.join("out").is_symlink() && root.join("out").is_dir())),
        ),
        attack("a hard link to outside", Archive::new().hard_link("x", canary), Refused("does not have")),
        attack("a hard link upwards", Archive::new().hard_link("x", "../../canary"), Refused("`..`")),
        attack(
            "a hard link through a link",
            Archive::new().symlink("out", folder).hard_link("x", &format!("out/{name}")),
            Refused("does not have"),
        ),
        attack(
            "a hard link to a link, then written through",
            Archive::new().symlink("out", canary).hard_link("x", "out").file("x", b"evil"),
            Harmless(|root| {
                assert!(root.join("out").is_symlink());
                assert_eq!(text(root, "x"), "evil");
            }),
        ),
        attack(
            "a hard link to a folder",
            Archive::new().folder("a/").hard_link("b", "a"),
            Refused("to a folder"),
        ),
        attack(
            "a hard link to itself",
            Archive::new().file("a", b"x").hard_link("a", "a"),
            Harmless(|root| {
                assert_eq!(text(root, "a"), "x");
            }),
        ),
        attack("a hard link to nothing", Archive::new().hard_link("a", "nothing"), Refused("does not have")),
        attack("a link to nothing", Archive::new().link(EntryType::Symlink, "a", ""), Refused("no path")),
        attack(
            "magic links of the kernel",
            Archive::new().symlink("p", "/proc/self/root").file("p/x", b""),
            Refused("leads nowhere"),
        ),
    ]
}

fn odd_things() -> Vec<Attack> {
    let setuid = || header(EntryType::Regular, 0o6755);
    let mut huge_owner = header(EntryType::Regular, 0o644);
    huge_owner.set_uid(4_294_967_295);
    let mut unreadable = header(EntryType::Directory, 0);
    unreadable.set_mtime(1_600_000_000);
    vec![
        attack(
            "devices are left out",
            Archive::new()
                .link(EntryType::Block, "dev/sda", "")
                .link(EntryType::Char, "dev/mem", "")
                .file("a", b"x"),
            Harmless(|root| {
                is_missing(root, "dev/sda");
                is_missing(root, "dev/mem");
                assert_eq!(text(root, "a"), "x");
            }),
        ),
        attack(
            "fifos are kept, and not waited for",
            Archive::new().link(EntryType::Fifo, "f", ""),
            Harmless(|root| {
                assert!(std::fs::symlink_metadata(root.join("f")).unwrap().file_type().is_fifo());
            }),
        ),
        attack(
            "setuid stays",
            Archive::new().entry(setuid(), "su", b"x"),
            Harmless(|root| assert_eq!(mode(root, "su"), 0o6755)),
        ),
        attack(
            "an owner of -1 is nobody",
            Archive::new().entry(huge_owner, "a", b"x"),
            Harmless(|root| {
                let uid = std::fs::metadata(root.join("a")).unwrap().uid();
                assert_eq!(uid, if is_root() { 65_534 } else { rustix::process::geteuid().as_raw() });
            }),
        ),
        attack(
            "a folder without rights holds files",
            Archive::new().entry(unreadable, "d/", b"").file("d/x", b"x"),
            Harmless(|root| {
                let as_root = is_root();
                assert_eq!(mode(root, "d"), if as_root { 0 } else { 0o700 });
                assert_eq!(text(root, "d/x"), "x");
                assert_eq!(std::fs::metadata(root.join("d")).unwrap().mtime(), 1_600_000_000);
            }),
        ),
        attack(
            "of attributes only the user's stay, and no orders to overlayfs",
            Archive::new()
                .pax(&[
                    ("SCHILY.xattr.user.kept", b"yes"),
                    ("SCHILY.xattr.user.overlay.redirect", b"/etc"),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                    ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
                ])
                .folder("d/"),
            Harmless(|root| {
                let folder = root.join("d");
                assert_eq!(attribute(&folder, "user.kept").unwrap(), b"yes");
                for name in ["user.overlay.redirect", "trusted.overlay.opaque", "security.capability"] {
                    assert_eq!(attribute(&folder, name), None, "{name}");
                }
            }),
        ),
        attack(
            "the later of two entries wins",
            Archive::new().file("a", b"first").file("a", b"second"),
            Harmless(|root| {
                assert_eq!(text(root, "a"), "second");
            }),
        ),
        attack(
            "what replaces a hard-linked file leaves the other",
            Archive::new().file("a", b"first").hard_link("b", "a").file("b", b"second"),
            Harmless(|root| {
                assert_eq!((text(root, "a"), text(root, "b")), ("first".into(), "second".into()));
            }),
        ),
        attack(
            "a file over a folder",
            Archive::new().folder("a/").file("a/b/c", b"x").file("a", b"y"),
            Harmless(|root| {
                assert_eq!(text(root, "a"), "y");
            }),
        ),
        attack(
            "a folder over a file",
            Archive::new().file("a", b"y").folder("a/").file("a/b", b"x"),
            Harmless(|root| {
                assert_eq!(text(root, "a/b"), "x");
            }),
        ),
        attack("a file below a file", Archive::new().file("a", b"y").file("a/b", b"x"), Refused("is a file")),
        attack("a root that is a file", Archive::new().file("./", b"").file(".", b"x"), Refused("the root")),
        attack("an entry of no name", Archive::new().file("", b"x"), Refused("no name")),
        attack(
            "an entry of an unknown kind",
            Archive::new().link(EntryType::new(b'Z'), "a", ""),
            Refused("unknown kind `Z`"),
        ),
    ]
}

fn whiteouts() -> Vec<Attack> {
    vec![
        attack(
            "a whiteout hides what is below",
            Archive::new().file("a/.wh.b", b""),
            Harmless(|root| {
                is_whiteout(root, "a/b");
                is_missing(root, "a/.wh.b");
            }),
        ),
        attack(
            "an opaque folder",
            Archive::new().folder("a/").file("a/.wh..wh..opq", b""),
            Harmless(|root| {
                assert!(is_opaque(root, "a"));
                assert!(!is_opaque(root, ""));
            }),
        ),
        attack(
            "a whiteout does not hide its own layer",
            Archive::new().file("a", b"x").file(".wh.a", b""),
            Harmless(|root| {
                assert_eq!(text(root, "a"), "x");
            }),
        ),
        attack(
            "a folder after its whiteout is opaque",
            Archive::new().file(".wh.a", b"").file("a/b", b"x"),
            Harmless(|root| {
                assert!(is_opaque(root, "a"));
                assert_eq!(text(root, "a/b"), "x");
            }),
        ),
        attack(
            "a folder before its whiteout is opaque",
            Archive::new().file("a/b", b"x").file(".wh.a", b""),
            Harmless(|root| {
                assert!(is_opaque(root, "a"));
                assert_eq!(text(root, "a/b"), "x");
            }),
        ),
        attack(
            "a folder of its own after its whiteout",
            Archive::new().file(".wh.a", b"").folder("a/"),
            Harmless(|root| {
                assert!(is_opaque(root, "a"));
            }),
        ),
        attack("a whiteout of `..`", Archive::new().file("a/.wh...", b""), Refused("no name")),
        attack("a whiteout of nothing", Archive::new().file("a/.wh.", b""), Refused("no name")),
        attack("a file within a whiteout", Archive::new().file(".wh.a/b", b"x"), Refused("in a whiteout")),
        attack(
            "what AUFS left",
            Archive::new().file(".wh..wh.plnk/1.2", b"x").file(".wh..wh.aufs", b""),
            Harmless(|root| {
                assert_eq!(std::fs::read_dir(root).unwrap().count(), 0);
            }),
        ),
        attack(
            "a whiteout through a link",
            Archive::new().symlink("out", "/").file("out/.wh.etc", b""),
            Harmless(|root| {
                is_whiteout(root, "etc");
            }),
        ),
        attack(
            "a device 0:0 is no way to make one",
            Archive::new().link(EntryType::Char, "etc", ""),
            Harmless(|root| is_missing(root, "etc")),
        ),
        attack(
            "a hard link to a whiteout",
            Archive::new().file(".wh.a", b"").hard_link("b", "a"),
            Refused("does not have"),
        ),
    ]
}

fn bombs() -> Vec<Attack> {
    let deep = |depth: usize| vec!["a"; depth].join("/");
    let mut many = Archive::new();
    for index in 0..=ENTRIES {
        many = many.file(&format!("f{index}"), b"");
    }
    let mut huge = header(EntryType::Regular, 0o644);
    huge.set_size(1 << 40);
    huge.as_old_mut().name[0] = b'a';
    huge.set_cksum();
    let long_name = "n".repeat(300);
    let long_path = vec!["p".repeat(250); 18].join("/");
    let mut sparse = header(EntryType::GNUSparse, 0o644);
    sparse.as_gnu_mut().unwrap().set_real_size(1 << 40);
    vec![
        attack("too many entries", many, Refused("too many entries")),
        Attack {
            name: "too many bytes",
            layer: Packing::Gzip.pack(&Archive::new().file("a", &vec![0; LAYER_BYTES as usize]).bytes()),
            then: Refused("too many bytes"),
        },
        attack(
            "a file said to have a terabyte",
            Archive::new().raw(huge.as_bytes()),
            Refused("too many bytes"),
        ),
        attack(
            "a pax record said to have a terabyte",
            Archive::new().pax(&[("size", b"1099511627776")]).file("a", b"x"),
            Refused("too many bytes"),
        ),
        attack(
            "a size that is no number of bytes",
            Archive::new().pax(&[("size", b"18446744073709551615")]).file("a", b"x"),
            Refused("larger than any file"),
        ),
        attack("a hole of a terabyte", Archive::new().entry(sparse, "a", b""), Refused("too many bytes")),
        attack("too deep", Archive::new().file(&deep(DEPTH + 1), b""), Refused("too deep")),
        attack(
            "just deep enough",
            Archive::new().file(&deep(DEPTH), b"x"),
            Harmless(|root| {
                assert_eq!(text(root, &vec!["a"; DEPTH].join("/")), "x");
            }),
        ),
        attack(
            "too long a name",
            Archive::new().pax(&[("path", long_name.as_bytes())]).file("a", b""),
            Refused("255 bytes"),
        ),
        attack(
            "too long a path",
            Archive::new().pax(&[("path", long_path.as_bytes())]).file("a", b""),
            Refused("4095 bytes"),
        ),
        attack(
            "attributes without end",
            Archive::new().pax(&[("SCHILY.xattr.user.a", &vec![b'x'; (1 << 20) + 1])]).file("a", b""),
            Refused("too many bytes"),
        ),
        attack(
            "pax records without an entry, again and again",
            Archive::new()
                .pax(&[("a", &vec![b'x'; 600_000])])
                .pax(&[("a", &vec![b'x'; 600_000])])
                .file("a", b""),
            Refused("too many bytes"),
        ),
        attack(
            "an attribute larger than the file system takes",
            Archive::new().pax(&[("SCHILY.xattr.user.a", &[b'x'; 60_000])]).file("a", b"x"),
            Harmless(|root| {
                assert_eq!(text(root, "a"), "x");
            }),
        ),
    ]
}

fn broken() -> Vec<Attack> {
    let whole = || Archive::new().file("a", &[b'x'; 2000]);
    let cut = |end: usize| Attack {
        name: "it ends early",
        layer: whole().bytes()[..end].to_vec(),
        then: Refused("ends in the middle"),
    };
    let mut wrong_sum = whole().bytes();
    wrong_sum[0] = b'b';
    let mut bad_pax = Archive::new();
    bad_pax = bad_pax.entry(header(EntryType::XHeader, 0o644), "pax", b"7 path=x\n");
    let mut cut_gzip = Packing::Gzip.pack(&whole().bytes());
    cut_gzip.truncate(cut_gzip.len() - 20);
    let mut cut_zstd = Packing::Zstd.pack(&whole().bytes());
    cut_zstd.truncate(cut_zstd.len() - 5);
    let packed = |name, layer, then| Attack { name, layer, then };
    vec![
        cut(100),
        cut(512),
        cut(1000),
        cut(2512),
        packed("a header that was changed", wrong_sum, Refused("checksum")),
        attack("a pax record that lies about itself", bad_pax.file("a", b""), Refused("pax record")),
        attack(
            "a sparse file in pax form",
            Archive::new().pax(&[("GNU.sparse.major", b"1")]).file("a", b""),
            Refused("sparse"),
        ),
        packed("gzip that ends early", cut_gzip, Refused("")),
        packed("zstd that ends early", cut_zstd, Refused("")),
        packed("xz", b"\xfd7zXZ\0and more".to_vec(), Refused("xz")),
        packed("no archive at all", b"hello".repeat(200), Refused("no tar archive")),
        packed(
            "nothing",
            Vec::new(),
            Harmless(|root| assert_eq!(std::fs::read_dir(root).unwrap().count(), 0)),
        ),
        packed(
            "no end, as some tools leave it",
            whole().bytes()[..512 + 2048].to_vec(),
            Harmless(|root| {
                assert_eq!(text(root, "a").len(), 2000);
            }),
        ),
    ]
}

fn all_errors(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

async fn try_all(attacks: impl FnOnce(&str) -> Vec<Attack>) {
    let folder = TempDir::new().unwrap();
    let canary = folder.path().join("canary");
    std::fs::write(&canary, "alive").unwrap();
    let attacks = attacks(canary.to_str().unwrap());
    let images = folder.path().join("images");
    let unpack =
        UnpackLimits { layer_bytes: LAYER_BYTES, entries: ENTRIES, depth: DEPTH, ..UnpackLimits::default() };
    let lab = Lab::new(StoreOptions { images_folder: Some(images.clone()), unpack, ..options() });
    for Attack { name, layer, then } in attacks {
        let (made, layout) = (as_it_is(layer), images.join("it"));
        write_layout(&layout, &[("it", &made)]);
        let result = obtain(&lab.store, "oci:it:it").await;
        match (then, result) {
            (Refused(part), Err(error)) => {
                let error = all_errors(&error);
                assert!(error.contains(part), "{name}: {error}");
            }
            (Refused(_), Ok(image)) => panic!("{name}: unpacked to {:?}", image.layers),
            (Harmless(check), result) => {
                let image = result.unwrap_or_else(|error| panic!("{name}: {}", all_errors(&error)));
                check(&image.layers[0]);
            }
        }
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "alive", "{name}");
        lab.store.close().await;
        assert_eq!(lab.names("staging"), Vec::<String>::new(), "{name}");
    }
    let good = image(&[(Archive::new().file("good", b"x").bytes(), Packing::Gzip)]);
    write_layout(&images.join("good"), &[("it", &good)]);
    assert_eq!(read(&obtain(&lab.store, "oci:good").await.unwrap(), 0, "good"), "x");
}

/// An image whose one layer is these bytes, packed or not; its diff id is right where that can be known.
fn as_it_is(layer: Vec<u8>) -> MadeImage {
    let diff_id = sealci_image::Digest::of(&layer).to_string();
    image_of(
        vec![Blob::new(layer)],
        &[Packing::Plain],
        &[diff_id],
        this_architecture(),
        serde_json::json!({}),
    )
}

#[tokio::test]
async fn nothing_leads_out() {
    try_all(ways_out).await;
}

#[tokio::test]
async fn odd_entries_are_kept_or_left_out() {
    try_all(|_| odd_things()).await;
}

#[tokio::test]
async fn whiteouts_become_overlayfs_own() {
    try_all(|_| whiteouts()).await;
}

#[tokio::test]
async fn what_is_too_much_is_refused() {
    try_all(|_| bombs()).await;
}

#[tokio::test]
async fn broken_layers_are_refused() {
    try_all(|_| broken()).await;
}

#[tokio::test]
async fn a_layer_that_unpacks_to_a_thousand_times_its_size_is_stopped() {
    // Megabytes of zeros, in a kilobyte.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    let mut head = header(tar::EntryType::Regular, 0o644);
    head.as_old_mut().name[0] = b'a';
    head.set_size(24 << 20);
    head.set_cksum();
    std::io::Write::write_all(&mut encoder, head.as_bytes()).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), 24 << 20), &mut encoder).unwrap();
    let bomb = as_it_is(encoder.finish().unwrap());
    let images = TempDir::new().unwrap();
    write_layout(&images.path().join("it"), &[("it", &bomb)]);
    let unpack = UnpackLimits { ratio_from_bytes: 16 << 20, ..UnpackLimits::default() };
    let lab = Lab::new(StoreOptions { images_folder: Some(images.path().to_owned()), unpack, ..options() });
    let error = obtain(&lab.store, "oci:it").await.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error:?}");
    assert!(error.to_string().contains("too many times its size"), "{error}");
}

#[tokio::test]
async fn a_sparse_file_has_its_holes() {
    let mut head = header(EntryType::GNUSparse, 0o644);
    let gnu = head.as_gnu_mut().unwrap();
    gnu.set_real_size(10_000);
    for (index, (offset, length)) in [(1000_u64, 3_u64), (9000, 4)].into_iter().enumerate() {
        gnu.sparse[index].set_offset(offset);
        gnu.sparse[index].set_length(length);
    }
    let made =
        image(&[(Archive::new().entry(head, "a", b"abcdefg").file("b", b"next").bytes(), Packing::Plain)]);
    let images = TempDir::new().unwrap();
    write_layout(&images.path().join("it"), &[("it", &made)]);
    let lab = Lab::new(StoreOptions { images_folder: Some(images.path().to_owned()), ..options() });
    let image = obtain(&lab.store, "oci:it").await.unwrap();
    let bytes = read(&image, 0, "a").into_bytes();
    assert_eq!(
        (bytes.len(), &bytes[1000..1003], &bytes[9000..9004], bytes[5000]),
        (10_000, &b"abc"[..], &b"defg"[..], 0)
    );
    assert_eq!(read(&image, 0, "b"), "next");
}
