"""DistillConfig, DistillTrainer, teachers, teacher data, checkpoints."""
