from grpo_fast.trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
