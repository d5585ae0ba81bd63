//! The product's main promise, as `make demo` shows it.

use palisade_ocf_tests::{Turn, must, run, staged, top};

#[test]
fn a_volume_survives_its_primary() {
    let _turn = Turn::take().unwrap();
    let stage = staged().unwrap().display().to_string();
    let program = top().join("demo/demo").display().to_string();
    let ran = run(&[program.as_str(), "run", "--stage", &stage], "").unwrap();
    assert!(ran.success, "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("PASSED: no acknowledged record lost"), "{}", ran.out);
    must(&[program.as_str(), "down"]).unwrap();
}
