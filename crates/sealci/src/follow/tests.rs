use super::*;

fn event(kind: &str, data: &str) -> sse::Event {
    sse::Event { kind: kind.into(), data: data.into() }
}

#[test]
fn the_offset_moves_with_chunks_and_gaps() {
    let mut offset = 0;
    let mut read = |event: sse::Event| log_event(&event, &mut offset).map(|event| (event, offset)).ok();
    let abc = || event("chunk", r#"{"offset":0,"data":"YWJj"}"#);
    assert_eq!(read(abc()), Some((Some(LogEvent::Bytes(b"abc".to_vec())), 3)));
    assert_eq!(read(abc()), Some((None, 3)), "a repetition is not shown twice");
    let overlapping = event("chunk", r#"{"offset":2,"data":"Y2Rl"}"#);
    assert_eq!(read(overlapping), Some((Some(LogEvent::Bytes(b"de".to_vec())), 5)));
    let gap = || event("gap", r#"{"offset":5,"to":9,"reason":"quota"}"#);
    assert_eq!(read(gap()), Some((Some(LogEvent::Gap { missing_bytes: 4, reason: "quota".into() }), 9)));
    assert_eq!(read(gap()), Some((None, 9)));
    let rest = event("gap", r#"{"offset":9,"to":9,"reason":"lost"}"#);
    assert_eq!(read(rest), Some((Some(LogEvent::Gap { missing_bytes: 0, reason: "lost".into() }), 9)));
    assert_eq!(read(event("something new", "{}")), Some((None, 9)));
    assert_eq!(read(event("end", r#"{"length":9}"#)), Some((Some(LogEvent::End), 9)));
}

#[test]
fn what_cannot_be_read_is_an_error() {
    for (kind, data) in [
        ("chunk", "{}"),
        ("chunk", r#"{"offset":-1,"data":""}"#),
        ("chunk", r#"{"offset":0,"data":"!"}"#),
        ("gap", r#"{"offset":0,"to":-5,"reason":""}"#),
    ] {
        assert!(log_event(&event(kind, data), &mut 0).is_err(), "{kind} {data}");
    }
}
