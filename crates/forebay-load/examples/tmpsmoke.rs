#![allow(clippy::print_stdout)]
use forebay_load::*;
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let a: Vec<String> = std::env::args().collect();
    let o = Options { url: a[1].clone(), load: Load::Concurrency(a[2].parse().unwrap()), until: Until::Requests(a[3].parse().unwrap()), ignore_eos: true, ..Options::default() };
    match run(&o, &Silent).await { Ok(r) => println!("{r}\n{:#}", r.to_json()), Err(e) => println!("{e}") }
}
