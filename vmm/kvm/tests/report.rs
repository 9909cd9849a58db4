//! The examination of this host, printed: `cargo test -p chronovisor-kvm --test report -- --nocapture`.

mod guest;

#[test]
fn every_deviation_comes_with_a_measure() {
    let report = match kvm::report() {
        Ok(report) => report,
        Err(error) => return guest::skipped(&error),
    };
    println!(
        "{} memory slots, {} virtual CPUs",
        report.memory_slots, report.max_vcpus
    );
    for (what, measure) in report.quirks.describe() {
        println!("{what}: {measure}");
        assert!(!measure.is_empty(), "{what}");
    }
    assert_eq!(kvm::report().expect("again"), report);
}
