"""placeholder"""
class EngineStats: pass
